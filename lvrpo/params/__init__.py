"""What an op is told and what it tells: parameters, presets, results. Imports torch alone."""
