"""Tables, figures and pages of a run, from its records alone."""
