"""The questions that tests ask a server, alone and all at once, and options of sampling."""

WORDS = ("ocean", "river", "stone", "tree", "bread", "light", "music", "rain")
QUESTIONS = [f"What does {word} mean?" for word in WORDS]
# Options of `run` and of a request, by the name of the answer: whether the model thinks, and how tokens are drawn.
DRAWN = {
    "thinking": (True, {}),
    "seeded": (False, {"temperature": 0.9, "seed": 7}),
    "reseeded": (False, {"temperature": 0.9, "seed": 8}),
    "all": (True, {"temperature": 1.3, "top_p": 0.8, "seed": 3}),
}
