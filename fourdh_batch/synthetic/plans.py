"""What happens in a clip: who goes where before which camera.

`CLIPS` are five written by hand; `draw_plan` draws any number. Positions and headings as in
`motion`: x right, z towards the viewer, metres; heading 0 is towards the viewer, 90 the right.
Times are seconds from the middle of a shot, where the planned meetings happen.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from fourdh_batch.synthetic.camera import CameraMove
from fourdh_batch.synthetic.motion import RUN, Gait
from fourdh_batch.synthetic.scene import DAYLIGHT, Block, Light, random_light

FPS = 25
STROLL = Gait(cycles_per_s=0.98)
STANDING = CameraMove()
FOCAL_HEIGHTS = 2.0  # usual focal length in picture heights
DRAWN_FRAMES = 90

FEATURES = {
    "crossing": "two people walk past each other, one hides the other",
    "occlusion": "somebody walks behind a pillar",
    "long_occlusion": "somebody walks behind a wall and is hidden for more than half a second",
    "reentry": "somebody leaves the picture and comes back",
    "scale": "somebody walks towards the camera or away",
    "moving_camera": "the camera pans, travels or is held by hand",
    "motion_blur": "a long exposure; somebody runs",
    "cut": "two or three shots, the people elsewhere and seen from elsewhere",
    "crowd": "five to eight people",
    "gestures": "everybody gestures, some bend, squat or kick",
}

# Features that need people of their own, and how many.
FEATURED = (
    ({"crossing"}, 2),
    ({"occlusion", "long_occlusion"}, 1),
    ({"reentry"}, 1),
    ({"scale"}, 1),
    ({"motion_blur"}, 1),
)


@dataclass(frozen=True, slots=True)
class Step:
    """What one person does in one shot.

    Attributes:
        person: number of the person in the clip.
        position_m: (x, z) on the floor in the middle of the shot, or where he turns back.
        heading_deg: direction of the walk, or of the look.
        turn_deg_per_m: change of direction on the way.
        gait: a stride of 0 stands.
        busy: share of the time spent on gestures, 0 to 1.
        turns_back_s: at this time, out of the picture, he turns and walks back.
        recording: number of a recorded motion to play instead, and the second of it that is shown
            in the middle of the shot.
    """

    person: int
    position_m: tuple[float, float]
    heading_deg: float
    turn_deg_per_m: float = 0.0
    gait: Gait = STROLL
    busy: float = 0.0
    turns_back_s: float | None = None
    recording: tuple[int, float] | None = None


@dataclass(frozen=True, slots=True)
class ShotPlan:
    """One camera and who is before it.

    Attributes:
        focal_heights: focal length in picture heights.
        exposure: share of the time between two frames in which the picture smears; 0 is sharp.
    """

    steps: tuple[Step, ...]
    camera: CameraMove = STANDING
    light: Light = DAYLIGHT
    blocks: tuple[Block, ...] = ()
    focal_heights: float = FOCAL_HEIGHTS
    exposure: float = 0.0


@dataclass(frozen=True, slots=True)
class ClipPlan:
    """Shots of equal length, one after the other by hard cuts; features out of `FEATURES`."""

    num_frames: int
    shots: tuple[ShotPlan, ...]
    features: frozenset[str] = frozenset()


CLIPS: dict[str, ClipPlan] = {
    # one hides the other in the middle
    "crossing": ClipPlan(
        60,
        (ShotPlan((Step(0, (0.0, 0.35), 90), Step(1, (0.1, -0.45), -92))),),
        frozenset({"crossing"}),
    ),
    # one leaves on the right, the other comes in there and passes behind
    "enter_leave": ClipPlan(
        75,
        (
            ShotPlan(
                (
                    Step(0, (0.95, 0.3), 88, gait=Gait(cycles_per_s=1.05)),
                    Step(1, (1.15, -0.6), -90, gait=Gait(cycles_per_s=1.0)),
                )
            ),
        ),
        frozenset({"crossing"}),
    ),
    # towards the viewer, away in an arc, and across behind both
    "trio": ClipPlan(
        60,
        (
            ShotPlan(
                (
                    Step(0, (-0.75, -0.2), -8, gait=Gait(cycles_per_s=0.85, stride=0.8)),
                    Step(
                        1,
                        (0.85, -0.3),
                        215,
                        turn_deg_per_m=35,
                        gait=Gait(cycles_per_s=0.9, stride=0.9),
                    ),
                    Step(2, (0.1, -1.3), 90, gait=Gait(cycles_per_s=1.0)),
                )
            ),
        ),
        frozenset({"scale"}),
    ),
    "empty": ClipPlan(48, (ShotPlan(()),)),
    # two walk; after the cut one of them, elsewhere and seen from nearer
    "cut": ClipPlan(
        60,
        (
            ShotPlan((Step(0, (-0.5, 0.2), 60), Step(1, (0.8, -0.5), -70))),
            ShotPlan(
                (
                    Step(
                        0,
                        (0.5, 0.4),
                        -35,
                        turn_deg_per_m=-50,
                        gait=replace(STROLL, stride=0.9),
                    ),
                ),
                camera=CameraMove(position_m=(1.8, 1.7, 5.4), yaw_deg=16, pitch_deg=8),
            ),
        ),
        frozenset({"cut"}),
    ),
}


def drawn_clips(
    seed: int, count: int, *, num_recordings: int = 0, num_frames: int = DRAWN_FRAMES
) -> dict[str, ClipPlan]:
    """`count` drawn plans; the first ones go through all of `FEATURES` in turn.

    Names are a number and the features, as in ``00012-crowd-reentry``.
    """
    names = list(FEATURES)
    drawn = {}
    for index in range(count):
        plan = draw_plan(
            seed,
            index,
            features=[names[index]] if index < len(names) else None,
            num_recordings=num_recordings,
            num_frames=num_frames,
        )
        drawn["-".join((f"{index:05d}", *sorted(plan.features)))] = plan
    return drawn


def draw_plan(
    seed: int,
    index: int,
    *,
    features: Iterable[str] | None = None,
    num_recordings: int = 0,
    num_frames: int = DRAWN_FRAMES,
) -> ClipPlan:
    """One clip, the same for the same arguments.

    Args:
        features: the clip shows these and no others; None: one to four are drawn.
        num_recordings: motions of capture that people may play; half of the extras do.
    Raises:
        ValueError: an unknown feature.
    """
    rng = np.random.default_rng([seed, index, 0x51])
    if features is None:
        features = rng.choice(list(FEATURES), int(rng.integers(1, 5)), replace=False).tolist()
    chosen = frozenset(features or ())
    if unknown := sorted(chosen - set(FEATURES)):
        raise ValueError(f"features: expected names out of {list(FEATURES)}, got {unknown}")
    least = 2 if "crossing" in chosen else 1
    cast = int(rng.integers(5, 9) if "crowd" in chosen else rng.integers(least, 5))
    cast = max(cast, sum(n for who, n in FEATURED if who & chosen))
    num_shots = int(rng.integers(2, 4)) if "cut" in chosen else 1
    shots = [_draw_shot(rng, chosen, cast, num_recordings, num_frames / num_shots)]
    while len(shots) < num_shots:  # after a cut some of them, placed anew
        others = chosen - {"cut"} if rng.random() < 0.5 else chosen & {"moving_camera", "gestures"}
        here = max(1, int(rng.integers(1, cast + 1)))
        shot = _draw_shot(rng, others, here, num_recordings, num_frames / num_shots)
        who = rng.permutation(cast)[: len(shot.steps)]
        steps = [replace(step, person=int(p)) for step, p in zip(shot.steps, who, strict=False)]
        shots.append(replace(shot, steps=tuple(steps)))
    return ClipPlan(num_frames, tuple(shots), chosen)


def _draw_shot(
    rng: np.random.Generator,
    features: frozenset[str],
    cast: int,
    num_recordings: int,
    num_frames: float,
) -> ShotPlan:
    many = cast > 4
    distance = float(rng.uniform(6.6, 8.2) if many else rng.uniform(4.8, 6.8))
    zoom = float(rng.uniform(1.8, 2.3))
    half_width = distance / (1.5 * zoom)  # of a picture of 4:3, at z = 0
    half_time = num_frames / FPS / 2
    blocks: list[Block] = []
    steps: list[Step] = []
    lanes = [0.45 - 0.6 * k for k in range(8)]  # z, so that nobody walks through anybody
    rng.shuffle(lanes[1:])

    def gait(fast: bool = False) -> Gait:
        if fast:
            return replace(RUN, cycles_per_s=float(rng.uniform(1.25, 1.5)))
        return Gait(
            cycles_per_s=float(rng.uniform(0.85, 1.05)),
            stride=float(rng.uniform(0.8, 1.15)),
            arm_swing=float(rng.uniform(0.5, 1.5)),
            lean_deg=float(rng.uniform(0, 6)),
            elbow_deg=float(rng.uniform(10, 35)),
        )

    def side() -> float:
        return float(rng.choice([-1.0, 1.0]))

    def busy() -> float:
        return float(rng.uniform(0.7, 1.0) if "gestures" in features else rng.choice([0.0, 0.4]))

    def add(x: float, z: float, heading: float, **more: object) -> None:
        step = Step(len(steps), (float(x), float(z)), float(heading), busy=busy(), gait=gait())
        steps.append(replace(step, **more))  # type: ignore[arg-type]

    if "crossing" in features:
        way = side()
        add(rng.uniform(-0.2, 0.2), lanes.pop(0), way * 90 + rng.normal(0, 6))
        add(rng.uniform(-0.2, 0.2), lanes.pop(0), -way * 90 + rng.normal(0, 6))
    if {"occlusion", "long_occlusion"} & features and len(steps) < cast:
        is_long = "long_occlusion" in features
        wide = rng.uniform(1.15, 1.45) if is_long else rng.uniform(0.4, 0.7)
        x, near = rng.uniform(-0.3, 0.3) * half_width, 0.95
        colour = tuple(rng.uniform(0.25, 0.8, 3).tolist())
        size = (float(wide), float(rng.uniform(2.1, 2.8)), 0.3)
        blocks.append(Block((float(x), near), size, float(rng.uniform(-8, 8)), colour))
        z = lanes.pop(0)
        add(x * (distance - z) / (distance - near), z, side() * 90)
    if "reentry" in features and len(steps) < cast:
        way, z = side(), lanes.pop(0)
        outside = half_width * (distance - z) / distance + 0.95
        add(
            way * outside,
            z,
            way * 90,
            turns_back_s=float(rng.uniform(-0.1, 0.1)),
            turn_deg_per_m=0.0,
        )
    if "scale" in features and len(steps) < cast:
        heading = rng.choice([0.0, 180.0]) + rng.normal(0, 8)
        add(rng.uniform(-0.5, 0.5) * half_width, lanes.pop(0), heading)
    if "motion_blur" in features and len(steps) < cast:
        add(0, lanes.pop(0), side() * rng.uniform(70, 110), gait=gait(fast=True))
    while len(steps) < cast:
        z = lanes.pop(0)
        width = half_width * (distance - z) / distance
        x = rng.uniform(-0.75, 0.75) * width
        kind = rng.random()
        if num_recordings and kind < 0.5:
            moment = float(rng.uniform(0, 1e3))  # wrapped to the recording's length
            which = int(rng.integers(num_recordings))
            add(x, z, rng.uniform(-180, 180), recording=(which, moment), busy=0.0)
        elif kind < 0.75 or "gestures" in features:
            standing = Gait(stride=0.0, arm_swing=float(rng.uniform(0, 0.3)))
            add(x, z, rng.normal(0, 60), gait=standing, busy=float(rng.uniform(0.5, 1.0)))
        else:
            add(x, z, side() * rng.uniform(60, 120), turn_deg_per_m=float(rng.normal(0, 12)))

    if rng.random() < 0.3:  # something low in front: a table, a crate
        x = rng.uniform(-0.9, 0.9) * half_width
        size = (float(rng.uniform(0.3, 0.9)), float(rng.uniform(0.3, 0.6)), 0.4)
        colour = tuple(rng.uniform(0.2, 0.8, 3).tolist())
        blocks.append(Block((float(x), 1.3), size, float(rng.uniform(-40, 40)), colour))

    height = float(rng.uniform(1.0, 2.4))
    move = CameraMove(
        position_m=(0.0, height, distance),
        pitch_deg=float(np.degrees(np.arctan2(height - rng.uniform(0.85, 1.0), distance))),
        shake_phase=float(rng.uniform(0, 2 * np.pi)),
    )
    if "moving_camera" in features:
        kind = int(rng.integers(3))
        pan, dolly = (
            side() * rng.uniform(3, 9) / max(half_time, 0.8),
            side() * rng.uniform(0.2, 0.5),
        )
        if kind == 0:
            move = replace(move, pan_deg_s=float(pan))
        elif kind == 1:
            move = replace(move, velocity_m_s=(float(dolly), 0.0, float(0.5 * dolly)))
        move = replace(move, shake_deg=float(rng.uniform(0.3, 0.9) if kind == 2 else 0.1))
    return ShotPlan(
        steps=tuple(steps),
        camera=move,
        light=random_light(rng),
        blocks=tuple(blocks),
        focal_heights=zoom,
        exposure=float(rng.uniform(0.5, 0.9)) if "motion_blur" in features else 0.0,
    )
