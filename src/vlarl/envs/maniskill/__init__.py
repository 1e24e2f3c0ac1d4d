"""ManiSkill 3 behind BatchedEnv, and the 25-object plate suite."""
