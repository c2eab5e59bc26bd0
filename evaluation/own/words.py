"""Words of which makers form their questions. Short and common, so that most tokenizers have few tokens for them."""

NAMES = (
    "Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Ida", "Jack", "Kate", "Leo", "Maria", "Nina",
    "Oscar", "Paul", "Rosa", "Sam", "Tom", "Vera",
)  # fmt: skip
CITIES = (
    "Berlin", "Boston", "Cairo", "Dublin", "London", "Madrid", "Oslo", "Paris", "Rome", "Tokyo", "Vienna", "Zurich",
)  # fmt: skip
NOUNS = (
    "apple", "bird", "boat", "book", "box", "bread", "cat", "chair", "city", "cloud", "dog", "door", "field", "fire",
    "fish", "flower", "garden", "glass", "hand", "house", "key", "lake", "lamp", "letter", "line", "list", "map",
    "moon", "night", "paper", "park", "pen", "river", "road", "room", "school", "ship", "star", "stone", "street",
    "sun", "table", "town", "tree", "water", "wind", "window", "word",
)  # fmt: skip
COLORS = ("black", "blue", "brown", "green", "grey", "red", "white", "yellow")
ADJECTIVES = ("big", "bright", "cold", "dark", "long", "new", "old", "quiet", "short", "small", "warm", "wide")
