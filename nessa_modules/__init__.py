"""Speaker models brought into one space: readers, extractors, alignments, trials and voice profiles."""
