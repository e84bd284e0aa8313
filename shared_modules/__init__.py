"""What the recipes share: options, files, checkpoints, records, statistics, audio, synthetic voices."""
