"""`caravan bench`: everything that measures, one file for each question."""
