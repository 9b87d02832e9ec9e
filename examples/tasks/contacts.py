"""Task: turn an order in a sentence into strict JSON with name, item, quantity and city.

All sentences and words were written for this task. It takes more than copying: numbers are words or
digits, things are singular in the answer, and the keys are not in the order of the sentence.
"""

from __future__ import annotations

import json
from typing import Final

from .draw import Draw, Row, different

NAMES: Final = (
    *("Ada", "Ben", "Carla", "David", "Elena", "Farid", "Grace", "Hugo", "Iris", "Jonas"),
    *("Kate", "Liam", "Maria", "Noah", "Olga", "Peter", "Rosa", "Simon", "Tara", "Victor"),
    *("Wendy", "Yusuf", "Anna", "Bruno", "Clara", "Emil", "Fiona", "George", "Helen", "Ivan"),
)
UNSEEN_NAMES: Final = ("Martin", "Sofia", "Daniel", "Julia", "Oscar", "Laura", "Felix", "Nina")
CITIES: Final = (
    *("Paris", "London", "Berlin", "Madrid", "Rome", "Vienna", "Oslo", "Dublin", "Athens"),
    *("Lisbon", "Prague", "Boston", "Chicago", "Denver", "Dallas", "Toronto", "Sydney", "Tokyo"),
)
THINGS: Final = (
    *("lamp", "chair", "table", "kettle", "pillow", "blanket", "mirror", "clock", "candle"),
    *("basket", "bottle", "camera", "guitar", "helmet", "jacket", "ladder", "notebook"),
    *("pencil", "printer", "radio", "ticket", "umbrella", "wallet", "keyboard"),
)
NUMBERS: Final = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SENTENCES: Final = (
    "{name} from {city} would like {things}.",
    "{name} in {city} ordered {things}.",
    "Please send {things} to {name} in {city}.",
    "Hi, this is {name}. I need {things} here in {city}.",
    "We got a call from {city}: {name} wants {things}.",
    "{things} for {name}, to be delivered to {city}.",
    "Could you ship {things} to {city}? The name is {name}.",
    "My name is {name}, I live in {city} and I want to buy {things}.",
    "{city} office: {name} is asking for {things}.",
    "Put {things} aside for {name}, who comes from {city}.",
)
QUESTION: Final = "Give name, item, quantity and city as JSON: "


def rows(count: int, seed: int, held_out: bool = False) -> list[Row]:
    """Makes rows of {"prompt", "completion"}; every second held-out row has an unseen name."""
    draw = Draw("contacts", seed, held_out)

    def make(number: int) -> Row:
        unseen = held_out and number % 2 == 1
        name = draw.one(UNSEEN_NAMES if unseen else NAMES)
        while True:
            thing, city = draw.one(THINGS), draw.one(CITIES)
            if unseen or _is_held_out(name, thing, city) == held_out:
                break
        quantity = 1 + draw.below(len(NUMBERS))
        amount = draw.one((NUMBERS[quantity - 1], str(quantity)))
        things = f"{amount} {thing}{'s' if quantity > 1 else ''}"
        sentence = draw.one(SENTENCES).format(name=name, city=city, things=things)
        answer = {"name": name, "item": thing, "quantity": quantity, "city": city}
        return {
            "prompt": QUESTION + sentence[0].upper() + sentence[1:],
            "completion": json.dumps(answer),
        }

    return different(make, count)


def _is_held_out(name: str, thing: str, city: str) -> bool:
    """Returns true for a fifth of all combinations; every word occurs in many of them."""
    return (NAMES.index(name) + 2 * THINGS.index(thing) + 3 * CITIES.index(city)) % 5 == 0
