"""Everything that talks to other ranks: engine, Fisher, checkpoints."""
