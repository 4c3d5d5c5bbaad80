"""What each command does, by calling the rooms; one module per group of commands, `targets` for what they share."""
