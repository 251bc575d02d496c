"""Full ranking: metrics, slices of users, baselines, and whether one expert dominates."""
