"""Recipes: trainings as YAML files that are checked before anything is loaded, and can be run again."""
