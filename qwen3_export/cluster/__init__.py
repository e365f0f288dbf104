"""Other machines, by way of Ray.

    session   attach to a cluster or start one here, place an object on a node, ask it; the only file that imports ray
    board     which piece of shared work is whose, and what is done

It knows nothing of quantizing or proving: `solve.cluster` says what the objects do.
"""
