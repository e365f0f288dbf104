"""The questions that tests ask a server, alone and all at once."""

WORDS = ("ocean", "river", "stone", "tree", "bread", "light", "music", "rain")
QUESTIONS = [f"What does {word} mean?" for word in WORDS]
