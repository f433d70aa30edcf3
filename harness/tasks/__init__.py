"""Tasks: one file each, all of them a `harness.tasks.base.Task`."""
