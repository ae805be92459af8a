"""Every settings class of an experiment file, free of torch; how the file is read and validated."""
