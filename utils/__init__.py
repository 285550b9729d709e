"""The harness below the learners: config, tasks, runtime, checkpoints, metrics, results. Imports no learner."""
