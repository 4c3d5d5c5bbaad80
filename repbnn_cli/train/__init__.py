"""Training: data on the device, schedules, recipes, and the engine that runs them."""
