"""Caching decisions: signals, gates, predictors, guards, presets. Pure logic on numbers, no arrays of any framework."""
