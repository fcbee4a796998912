"""Noise schedules, timestep sampling and objectives: pure functions with the papers' symbols."""
