"""Fine-tunes from the command line: data, training, report and the command with its options."""
