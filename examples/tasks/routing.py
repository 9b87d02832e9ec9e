"""Task: label a customer's message to a shop with its queue and its priority.

All sentences and words were written for this task. The labels are invented, so no model knows them
without training. The answer is the label and nothing else.
"""

from __future__ import annotations

from typing import Final

from .draw import Draw, Row, different

QUEUES: Final = {
    "bill": (
        "I was charged twice for the {thing}",
        "the invoice for the {thing} shows the wrong amount",
        "my card was billed but I never bought a {thing}",
        "the discount on the {thing} is missing from my bill",
        "you took too much money for the {thing}",
    ),
    "ship": (
        "the parcel with my {thing} has not arrived",
        "the courier left my {thing} at the wrong house",
        "tracking says that my {thing} is still in the depot",
        "where is the {thing} that you sent last week",
        "my {thing} was delivered to a neighbour I do not know",
    ),
    "back": (
        "I want to send the {thing} back",
        "how do I return a {thing} that does not fit",
        "please take the {thing} back, I changed my mind",
        "I would like to exchange the {thing} for another size",
        "the {thing} is not for me and I want to give it back",
    ),
    "fix": (
        "the {thing} stopped working",
        "my {thing} arrived broken",
        "the {thing} makes a strange noise and does not start",
        "a part of the {thing} fell off",
        "the {thing} is defective and needs a repair",
    ),
    "user": (
        "I cannot log in to see my order of a {thing}",
        "my password is refused when I order a {thing}",
        "please change the e-mail of my account, I ordered a {thing}",
        "the site signs me out when I look at the {thing}",
        "I forgot my password and cannot buy the {thing}",
    ),
    "sale": (
        "do you have the {thing} in blue",
        "when will the {thing} be in stock again",
        "is the {thing} good for a small flat",
        "which {thing} would you recommend for a gift",
        "does the {thing} come with batteries",
    ),
}
"""Sentences by queue. Training data never contains the last one of each."""

THINGS: Final = (
    *("lamp", "chair", "table", "kettle", "blanket", "mirror", "clock", "camera", "guitar"),
    *("helmet", "jacket", "ladder", "printer", "radio", "umbrella", "keyboard", "toaster", "desk"),
)
PRIORITIES: Final = {
    "p1": (
        "This is urgent!",
        "I need help right now.",
        "Please answer at once.",
        "It cannot wait.",
    ),
    "p2": ("", "Thank you.", "Best wishes.", "Greetings from a customer."),
    "p3": (
        "There is no hurry.",
        "Take your time.",
        "Whenever you have a moment.",
        "Next month is fine too.",
    ),
}
ASKING: Final = ("where ", "how ", "do ", "when ", "is ", "which ", "does ")
OPENINGS: Final = ("", "Hello, ", "Hi there, ", "Dear team, ", "Good morning, ")


def rows(count: int, seed: int, held_out: bool = False) -> list[Row]:
    """Makes rows of {"prompt", "completion"}; half of the held-out rows have unseen sentences."""
    draw = Draw("routing", seed, held_out)
    labels = [(queue, priority) for queue in QUEUES for priority in PRIORITIES]

    def make(number: int) -> Row:
        queue, priority = labels[number % len(labels)]
        *seen, unseen = QUEUES[queue]
        while True:
            which, thing = draw.below(len(seen)), draw.below(len(THINGS))
            if ((which + thing) % 4 == 0) == held_out:  # a quarter of combinations is held out
                break
        # Every second round of labels has unseen sentences.
        new = held_out and number // len(labels) % 2 == 1
        sentence = (unseen if new else seen[which]).format(thing=THINGS[thing])
        opening, closing = draw.one(OPENINGS), draw.one(PRIORITIES[priority])
        text = f"{opening}{sentence}"
        end = "?" if sentence.startswith(ASKING) else "."
        message = f"{text[0].upper()}{text[1:]}{end} {closing}".strip()
        return {"prompt": message, "completion": f"{queue}.{priority}"}

    return different(make, count)
