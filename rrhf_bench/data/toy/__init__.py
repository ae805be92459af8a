"""The embedded world: a grammar that writes dialogues, a labeller that compares them, a gold reward for any reply."""
