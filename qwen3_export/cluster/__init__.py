"""Work on other machines, by way of Ray.

    session   attaches to a cluster or starts one, places actors on nodes and calls them; alone imports ray
    address   how a cluster's address is written, and whether a Ray head answers there
    board     assigns pieces of shared work to workers, and knows which are done

Nothing here knows of quantizing or proving: the actors are those of `solve.cluster` and `prove.lab`.
"""
