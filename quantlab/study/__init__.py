"""Studies of models: sensitivity, recipes, tables and plots."""
