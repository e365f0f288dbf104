"""A recipe for a size budget: sensitivities, a knapsack, and a search."""
