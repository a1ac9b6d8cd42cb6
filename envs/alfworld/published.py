"""What the published train games say about rooms: object counts, where objects lie, receptacles, task mix.

Counted over the 3,553 train games of release json_2.1.1 (ALFWorld, MIT; ALFRED, MIT), rounded to percent.

- ``SPAWN``: room kind, object type: weights of one, two or three instances, and of each receptacle type.
- ``MORE_RECEPTACLES``: receptacles of a room beyond those of ALFWorld's floor-plan files and ``STANDARD``.
- ``STANDARD``: how many there are of a receptacle type that a room's files name without giving a place.
- ``TASK_MIX``: games per task type and room kind.
- ``DESTINATIONS``: receptacle types that goals name, per task type.
- ``EXAMINED``: objects that are looked at under a lamp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Spawn:
    """How often an object type has 1, 2, 3 instances, and the receptacle types it lies on or in."""

    counts: tuple[int, int, int]
    places: dict[str, int]


def _spawn(table: str) -> dict[str, Spawn]:
    rows = {}
    for line in table.strip().splitlines():
        name, one, two, three, *places = line.split()
        weights = dict(zip(places[::2], map(int, places[1::2]), strict=True))
        rows[name] = Spawn((int(one), int(two), int(three)), weights)
    return rows


SPAWN: Final[dict[str, dict[str, Spawn]]] = {
    "kitchen": _spawn("""
Apple 33 31 35 CounterTop 25 Fridge 24 DiningTable 15 Microwave 13 GarbageCan 12 SinkBasin 9 SideTable 2
Book 60 27 13 CounterTop 65 Cabinet 14 DiningTable 11 Drawer 5 Shelf 4
Bowl 35 34 31 Cabinet 36 CounterTop 21 Fridge 20 DiningTable 15 SinkBasin 3 Microwave 3 Shelf 2
Bread 55 32 13 CounterTop 55 DiningTable 31 Fridge 12 SideTable 1 GarbageCan 1
ButterKnife 37 37 27 CounterTop 59 DiningTable 27 Drawer 8 SinkBasin 5 SideTable 1
CellPhone 37 34 29 Drawer 43 CounterTop 41 DiningTable 17
CreditCard 30 31 40 CounterTop 46 Drawer 37 Shelf 17
Cup 35 31 33 Cabinet 23 CounterTop 21 Fridge 21 DiningTable 15 SinkBasin 9 Microwave 7 SideTable 2 Shelf 2
DishSponge 33 33 34 CounterTop 26 Cabinet 24 Drawer 21 DiningTable 13 SinkBasin 7 GarbageCan 5 Shelf 3
Egg 32 35 33 Fridge 25 CounterTop 24 SinkBasin 13 GarbageCan 13 Microwave 12 DiningTable 12 SideTable 2
Fork 34 33 33 CounterTop 44 DiningTable 24 Drawer 22 SinkBasin 9 SideTable 2
Glassbottle 35 32 33 Cabinet 31 CounterTop 27 DiningTable 14 SinkBasin 9 Fridge 9 Shelf 4
Kettle 44 37 19 StoveBurner 41 CounterTop 25 Cabinet 24 DiningTable 7 SinkBasin 2
Knife 35 34 31 CounterTop 48 DiningTable 25 Drawer 21 SinkBasin 5 SideTable 1
Ladle 31 38 30 CounterTop 41 Cabinet 25 Drawer 17 DiningTable 14 SinkBasin 2
Lettuce 42 35 23 CounterTop 41 DiningTable 28 Fridge 23 SinkBasin 5 SideTable 2 GarbageCan 1
Mug 36 35 29 CounterTop 28 CoffeeMachine 17 Cabinet 16 Fridge 14 DiningTable 10 Microwave 7 SinkBasin 6
Pan 69 26 5 StoveBurner 52 CounterTop 33 Cabinet 7 DiningTable 4 Fridge 4
PaperTowelRoll 100 0 0 CounterTop 57 DiningTable 16 GarbageCan 15 Shelf 9 SideTable 2
Pen 33 31 35 CounterTop 39 DiningTable 34 Drawer 21 GarbageCan 5
Pencil 42 40 17 Drawer 41 CounterTop 30 DiningTable 19 GarbageCan 10
PepperShaker 29 33 37 Cabinet 33 CounterTop 30 DiningTable 16 Drawer 15 Shelf 3 SideTable 2
Plate 41 33 25 Cabinet 40 CounterTop 30 DiningTable 16 Fridge 9 SinkBasin 2 Shelf 2 Microwave 1
Pot 53 38 10 StoveBurner 73 CounterTop 14 Fridge 4 DiningTable 4 Cabinet 3
Potato 36 32 32 CounterTop 28 Fridge 26 DiningTable 17 SinkBasin 11 Microwave 10 GarbageCan 6 SideTable 1
SaltShaker 35 33 32 CounterTop 32 Cabinet 32 DiningTable 18 Drawer 14 Shelf 3 SideTable 2
SoapBottle 35 34 31 CounterTop 32 Cabinet 31 DiningTable 21 GarbageCan 10 Shelf 3 SideTable 1 Drawer 1
Spatula 35 35 30 CounterTop 45 DiningTable 25 Drawer 21 SinkBasin 9 SideTable 1
Spoon 32 34 33 CounterTop 38 Drawer 28 DiningTable 22 SinkBasin 11 SideTable 2
SprayBottle 35 41 24 CounterTop 33 Cabinet 33 DiningTable 22 GarbageCan 12
Statue 37 49 14 CounterTop 51 Shelf 44 DiningTable 5
Tomato 34 32 34 Fridge 33 CounterTop 30 DiningTable 20 GarbageCan 9 SinkBasin 7 SideTable 2
Vase 0 48 52 CounterTop 34 Shelf 32 Cabinet 31 DiningTable 3
WineBottle 36 32 33 CounterTop 37 Cabinet 25 DiningTable 24 GarbageCan 9 Shelf 3 Fridge 1
"""),
    "living_room": _spawn("""
Book 46 30 23 CoffeeTable 29 Dresser 24 Sofa 17 ArmChair 11 DiningTable 9 SideTable 8 Drawer 1
Bowl 41 39 20 DiningTable 37 CoffeeTable 27 SideTable 9 Shelf 8
Box 69 25 5 DiningTable 26 Sofa 24 CoffeeTable 23 SideTable 8 Cabinet 4 Shelf 4 Dresser 3 ArmChair 3 Ottoman 1
Candle 18 20 62 SideTable 41 CoffeeTable 28 DiningTable 20 Drawer 3 Dresser 2
CellPhone 37 32 32 Dresser 19 SideTable 17 CoffeeTable 17 Sofa 14 Drawer 13 DiningTable 9 ArmChair 4 Ottoman 4
CreditCard 27 33 40 Sofa 19 CoffeeTable 15 Drawer 13 ArmChair 13 SideTable 10 DiningTable 9 Dresser 7 Shelf 5
DeskLamp 100 0 0 SideTable 91 CoffeeTable 9
KeyChain 33 33 34 CoffeeTable 20 SideTable 16 Drawer 16 Sofa 12 ArmChair 9 DiningTable 7 Dresser 6 Shelf 5
Laptop 66 27 7 Sofa 27 CoffeeTable 25 DiningTable 21 Dresser 8 SideTable 7 ArmChair 5 Ottoman 2
Newspaper 38 33 28 Sofa 20 CoffeeTable 18 DiningTable 17 SideTable 14 Shelf 11 Dresser 8 ArmChair 7 Drawer 2
Pen 32 35 34 CoffeeTable 34 Dresser 22 SideTable 20 Drawer 6 GarbageCan 4 Shelf 4 DiningTable 4
Pencil 35 29 35 SideTable 32 CoffeeTable 27 Drawer 10 Dresser 7 GarbageCan 6 Shelf 6 DiningTable 4
Pillow 87 12 0 Sofa 80 ArmChair 20
Plate 45 40 15 DiningTable 50 CoffeeTable 24 Shelf 13 SideTable 11 Dresser 1
RemoteControl 31 33 36 CoffeeTable 24 Sofa 19 SideTable 13 DiningTable 11 Dresser 8 ArmChair 8 Drawer 4
Statue 24 39 37 CoffeeTable 26 Shelf 20 DiningTable 20 SideTable 19 Dresser 8
TissueBox 27 35 38 CoffeeTable 36 DiningTable 19 SideTable 19 Shelf 11 TVStand 8 Drawer 3 Dresser 2
Vase 17 26 57 Shelf 36 CoffeeTable 20 DiningTable 15 SideTable 12 Dresser 11 Cabinet 2
Watch 25 38 37 CoffeeTable 26 Drawer 21 SideTable 18 DiningTable 11 Dresser 11 Shelf 4
WateringCan 92 5 3 CoffeeTable 53 Shelf 38 SideTable 9
"""),
    "bedroom": _spawn("""
AlarmClock 48 33 19 Desk 34 Shelf 21 SideTable 19 Dresser 17 DiningTable 7 CounterTop 1
Book 42 32 26 Bed 51 Desk 19 Drawer 12 Dresser 5 SideTable 4 Cabinet 3 DiningTable 2 ArmChair 2 Shelf 2
Bowl 59 28 13 Desk 43 Shelf 30 Dresser 15 DiningTable 6 SideTable 4 CounterTop 2
Box 99 1 0 Desk 58 Shelf 42
CD 32 29 39 Drawer 28 Desk 20 Dresser 14 SideTable 13 GarbageCan 8 Shelf 7 DiningTable 6 Cabinet 2 Safe 1
CellPhone 31 34 35 Bed 29 Desk 17 Drawer 17 Dresser 10 SideTable 10 Shelf 8 DiningTable 3 ArmChair 3 Safe 2
CreditCard 32 34 34 Drawer 29 Shelf 18 Desk 18 SideTable 16 Dresser 12 DiningTable 3 ArmChair 3 CounterTop 1
DeskLamp 94 6 0 Desk 35 SideTable 28 Dresser 25 Shelf 11
KeyChain 31 33 35 Drawer 26 Desk 18 SideTable 16 Shelf 16 Dresser 13 DiningTable 4 Safe 4 ArmChair 3
Laptop 51 35 13 Bed 74 Desk 19 Dresser 4 DiningTable 2 ArmChair 1 CounterTop 1
Mug 39 34 28 Desk 36 Shelf 18 SideTable 16 Dresser 16 DiningTable 9 Cabinet 4 CounterTop 1
Pen 28 35 37 Desk 28 Drawer 18 Shelf 16 Dresser 15 SideTable 14 DiningTable 6 GarbageCan 2 CounterTop 1
Pencil 33 34 33 Desk 24 Drawer 18 SideTable 18 Shelf 17 Dresser 11 DiningTable 6 GarbageCan 5 CounterTop 1
Pillow 42 47 11 Bed 99 ArmChair 1
RemoteControl 32 37 31 Drawer 34 Desk 29 SideTable 15 CounterTop 8 ArmChair 6 DiningTable 4 Dresser 2 Shelf 1
Statue 64 25 11 Shelf 43 Dresser 27 Desk 26 SideTable 5
TeddyBear 100 0 0 Bed 100
TissueBox 41 35 25 Desk 37 Drawer 26 DiningTable 15 Shelf 12 SideTable 9 Dresser 2
Vase 19 48 33 Shelf 45 Dresser 36 Desk 11 SideTable 9
Watch 23 46 31 Drawer 31 Shelf 20 DiningTable 16 Desk 15 Dresser 11 SideTable 6
"""),
    "bathroom": _spawn("""
Candle 33 32 35 CounterTop 31 Toilet 30 Cabinet 13 Drawer 13 Shelf 7 SideTable 2 Cart 2 Dresser 1
Cloth 37 33 31 BathtubBasin 30 Cabinet 20 CounterTop 17 Drawer 15 SinkBasin 8 Shelf 4 Toilet 3 Cart 1
DishSponge 25 35 41 CounterTop 20 Drawer 20 BathtubBasin 18 SinkBasin 10 Shelf 10 Toilet 8 Cart 5 Cabinet 5
HandTowel 82 18 0 HandTowelHolder 96 CounterTop 4
PaperTowelRoll 100 0 0 CounterTop 35 Toilet 31 Shelf 17 GarbageCan 11 Cart 6
SoapBar 34 29 37 CounterTop 20 Toilet 16 SinkBasin 15 Cabinet 12 BathtubBasin 12 Drawer 11 GarbageCan 7
SoapBottle 34 36 31 CounterTop 30 Toilet 24 Cabinet 20 Shelf 9 GarbageCan 9 Drawer 3 SideTable 1 Cart 1
SprayBottle 36 30 34 CounterTop 32 Toilet 27 Cabinet 16 GarbageCan 10 Shelf 7 Cart 4 SideTable 3 Dresser 2
TissueBox 44 30 26 CounterTop 36 Shelf 29 Drawer 20 Cabinet 5 Cart 4 SideTable 4 Toilet 3
ToiletPaper 0 67 33 Toilet 23 CounterTop 23 ToiletPaperHanger 12 Drawer 11 Cabinet 11 GarbageCan 9 Shelf 5
Towel 86 14 0 TowelHolder 97 CounterTop 3
"""),
}

STANDARD: Final[dict[str, int]] = {
    "StoveBurner": 4,
    "CoffeeMachine": 1,
    "Toaster": 1,
    "GarbageCan": 1,
    "LaundryHamper": 1,
    "HandTowelHolder": 1,
    "TowelHolder": 1,
    "ToiletPaperHanger": 1,
    "Toilet": 1,
}


def _more(table: str) -> dict[int, dict[str, int]]:
    rows = {}
    for entry in table.replace("\n", ",").strip(",").split(","):
        room, *counts = entry.split()
        rows[int(room)] = dict(zip(counts[::2], map(int, counts[1::2]), strict=True))
    return rows


MORE_RECEPTACLES: Final[dict[int, dict[str, int]]] = _more("""
1 Cabinet 1 Drawer 1 Shelf 1,2 Drawer 4 StoveBurner 2,3 Drawer 2,7 CounterTop 1,11 Drawer 1,12 Cabinet 4
13 Cabinet 9 Drawer 4,14 Cabinet 4,15 Cabinet 3,16 Cabinet 6,17 Cabinet 11 Drawer 6,18 Cabinet 3
19 Cabinet 8 Drawer 5,20 Cabinet 2 Drawer 1,22 Drawer 1,23 Cabinet 4 Drawer 1,24 Cabinet 2 Drawer 1
25 Cabinet 5,26 Cabinet 5,27 Cabinet 3,28 Cabinet 2 Drawer 2,203 Drawer 1,205 Ottoman 1
209 Drawer 1,211 Shelf 1,214 Shelf 1,224 Cabinet 1 Drawer 2,301 Drawer 10,302 Drawer 1 Shelf 2
303 Drawer 2 Shelf 2,304 Drawer 3 Shelf 1,305 Drawer 2,309 Drawer 1 Safe 1,316 Drawer 1,318 Drawer 3
319 Shelf 1,322 Drawer 2,324 Shelf 4,327 Drawer 1 Shelf 1,329 Drawer 2 SideTable 1,330 Drawer 2 Dresser 1
401 HandTowelHolder 1 TowelHolder 1,402 Shelf 1,403 Shelf 1 TowelHolder 1,405 HandTowelHolder 1
409 HandTowelHolder 1 TowelHolder 1,410 HandTowelHolder 1 TowelHolder 1,411 TowelHolder 1
412 Cabinet 1 HandTowelHolder 1,413 Drawer 4,414 Drawer 1,415 HandTowelHolder 1 Shelf 1
416 HandTowelHolder 1,418 HandTowelHolder 1 SinkBasin 1,419 Drawer 2,420 TowelHolder 1,421 Drawer 1
422 CounterTop 1 Drawer 2,423 HandTowelHolder 3,426 Drawer 1 TowelHolder 1,427 HandTowelHolder 1
429 Shelf 1 SinkBasin 1,430 Shelf 1
""")

TASK_MIX: Final[dict[str, dict[str, int]]] = {
    "look_at_obj_in_light": {"living_room": 51, "bedroom": 257},
    "pick_and_place_simple": {"kitchen": 79, "living_room": 210, "bedroom": 237, "bathroom": 264},
    "pick_clean_then_place_in_recep": {"kitchen": 501, "bathroom": 149},
    "pick_cool_then_place_in_recep": {"kitchen": 533},
    "pick_heat_then_place_in_recep": {"kitchen": 459},
    "pick_two_obj_and_place": {"kitchen": 124, "living_room": 216, "bedroom": 240, "bathroom": 233},
}

DESTINATIONS: Final[dict[str, tuple[str, ...]]] = {
    "pick_and_place_simple": (
        "ArmChair",
        "Bed",
        "Cabinet",
        "Cart",
        "CoffeeTable",
        "CounterTop",
        "Desk",
        "DiningTable",
        "Drawer",
        "Dresser",
        "Fridge",
        "GarbageCan",
        "Microwave",
        "Ottoman",
        "Safe",
        "Shelf",
        "SideTable",
        "Sofa",
        "StoveBurner",
        "Toilet",
        "ToiletPaperHanger",
    ),
    "pick_clean_then_place_in_recep": (
        "Cabinet",
        "Cart",
        "CoffeeMachine",
        "CounterTop",
        "DiningTable",
        "Drawer",
        "Dresser",
        "Fridge",
        "GarbageCan",
        "Microwave",
        "Shelf",
        "SideTable",
        "StoveBurner",
        "Toilet",
    ),
    "pick_cool_then_place_in_recep": (
        "Cabinet",
        "CoffeeMachine",
        "CounterTop",
        "DiningTable",
        "GarbageCan",
        "Microwave",
        "Shelf",
        "SideTable",
        "StoveBurner",
    ),
    "pick_heat_then_place_in_recep": (
        "Cabinet",
        "CoffeeMachine",
        "CounterTop",
        "DiningTable",
        "Fridge",
        "GarbageCan",
        "Shelf",
        "SideTable",
    ),
    "pick_two_obj_and_place": (
        "ArmChair",
        "Bed",
        "Cabinet",
        "Cart",
        "CoffeeTable",
        "CounterTop",
        "Desk",
        "DiningTable",
        "Drawer",
        "Dresser",
        "Fridge",
        "GarbageCan",
        "Microwave",
        "Ottoman",
        "Safe",
        "Shelf",
        "SideTable",
        "Sofa",
        "Toilet",
    ),
}

EXAMINED: Final[tuple[str, ...]] = (
    "AlarmClock",
    "Book",
    "Bowl",
    "Box",
    "CD",
    "CellPhone",
    "CreditCard",
    "KeyChain",
    "Laptop",
    "Mug",
    "Newspaper",
    "Pen",
    "Pencil",
    "Pillow",
    "Plate",
    "Statue",
    "TissueBox",
    "Vase",
    "Watch",
)
