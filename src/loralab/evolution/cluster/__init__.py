"""A search whose members are made, run and scored by actors on many machines.

The search is a deterministic state machine: a header and one fitness a generation give every state.
So each actor keeps a state of its own and moves it by `tell`, as the driver does; what travels is a
few kilobytes of numbers, whatever the model's size.

    messages.py   what is said, as bytes
    worker.py     what an actor does with it (no Ray)
    crew.py       actors of Ray: hired, called, lost
    fleet.py      who does which job next, and what happens when one is lost (no Ray)
    arena.py      a generation as jobs
    elsewhere.py  an engine that is on the actors: the guard's looks, the base's answers
    opening.py    from a config to a fleet
"""
