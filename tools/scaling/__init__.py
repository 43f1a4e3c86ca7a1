"""Library of tools/simulate_scaling.py: step times of trainings with many processes, from token counts and costs."""
