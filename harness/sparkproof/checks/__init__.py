"""Facts -> findings: pure functions, one topic a file; what they mean and how to cure it stands in `catalogue`."""
