"""Which bits: sensitivity, recipes, tables and plots."""
