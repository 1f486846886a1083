"""Fine-tuning from the command line: what reads the data, trains, reports and takes the options."""
