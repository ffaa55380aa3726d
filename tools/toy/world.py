"""One scene of the toy world: the road, everything that stands or moves on it, and the ego car's drive.

Places are laid out in road coordinates: s metres along the centre line from where the ego car starts, d
metres to its left. Traffic keeps to the right. Objects of one class keep well over 0.8 m apart, so that a
voxel is never within reach of two boxes of its class.
"""

from dataclasses import dataclass
from typing import Callable, List, NamedTuple, Optional, Tuple

import numpy as np

from lib.classes import OCC3D

from . import objects
from .road import (
    CELL,
    CROSS_STREET_HALF,
    GROUND_CLASSES,
    LANE_WIDTH,
    NO_GROUND,
    PARKING_CENTRE,
    Road,
    SideZone,
    draw_waves,
    paint_map,
)
from .shapes import ShapeTable, concat_tables, extent, make_table

KEYFRAME_SECONDS = 0.5
VIEW_DISTANCE = 140.0  # metres; shapes further from the ego car are left out
CLASS_IDS = {name: i for i, name in enumerate(OCC3D.class_names)}
GROUND_CLASS_IDS = np.array([CLASS_IDS[GROUND_CLASSES[code]] for code in sorted(GROUND_CLASSES)], dtype=np.uint8)
ITEM_LANE, WALKING_LANE = 7.9, 9.6  # d of what stands, and of who walks, on the sidewalks


class Pose(NamedTuple):
    """Position (map frame, metres) and heading (radians) on the ground."""

    x: float
    y: float
    z: float
    yaw: float


@dataclass
class ToyObject:
    """Anything but the ground.

    Attributes:
        index: its number in the scene.
        occ_class: class id (Occ3D).
        type: its annotated type, None for scenery (buildings, trees, posts), which gets no box.
        shapes: in its own frame.
        size: (length, width, height), metres, of the tightest box in its own frame.
        box_centre_z: height of the box's centre above the ground, metres.
        pose: function of time (seconds from the first keyframe) to :class:`Pose`.
        moving: it changes place.
    """

    index: int
    occ_class: int
    type: Optional[objects.ObjectType]
    shapes: ShapeTable
    size: Tuple[float, float, float]
    box_centre_z: float
    pose: Callable[[float], Pose]
    moving: bool


class Track(NamedTuple):
    """Pose over time of something that keeps its distance d (metres, left) from the road's centre line.

    Attributes:
        world: where it moves.
        s_of_t: metres along the road over seconds.
        d, turn: distance from the line; radians against the road's heading.
    """

    world: 'ToyWorld'
    s_of_t: Callable[[float], float]
    d: float
    turn: float

    def __call__(self, t: float) -> Pose:
        x, y, heading = (float(v) for v in self.world.road.at(self.s_of_t(t), self.d))
        return Pose(x, y, float(self.world.waves.height(x, y)), heading + self.turn)


class Look(NamedTuple):
    """Light of a scene: direction to the sun [3], RGB 0..1 of zenith and horizon, strengths of the light."""

    sun: np.ndarray
    zenith: Tuple[float, float, float]
    horizon: Tuple[float, float, float]
    sunlight: float
    ambient: float


class ToyWorld:
    """A scene of the toy world.

    Args:
        seed: of the data set.
        index: of the scene.
        keyframes: how many the scene has; the world is made long enough for the drive.

    Attributes:
        objects: list of :class:`ToyObject`, by index.
        moving: those of them that change place; their poses are :class:`Track` objects.
        ground: painted map, uint8 [rows, columns] (see ``road.paint_map``).
        waves: ground height.
        look: light.
    """

    def __init__(self, seed: int, index: int, keyframes: int):
        self._rng = np.random.default_rng([seed, index, 1])
        self._scene_index = index
        self.duration = (keyframes - 1) * KEYFRAME_SECONDS
        self.ego_speed = self._rng.uniform(4.5, 8.0)
        self._sway = self._rng.uniform(0, 2 * np.pi)
        self.road = Road(self._rng, self.ego_speed * self.duration)
        self.waves = draw_waves(self._rng)
        self.objects: List[ToyObject] = []
        self.crossing = self._rng.uniform(0.2 * self.road.length, self.road.length + 45.0)
        zones = self._draw_zones()
        self.ground = paint_map(self.road, zones, self.crossing)
        self.look = self._draw_look()
        self._furnish(zones)
        self._split_static()

    # ---- motion ----

    def ego_s(self, t: float) -> float:
        """Metres driven at time t."""
        return self.ego_speed * t + 0.5 * (np.sin(0.7 * t + self._sway) - np.sin(self._sway))

    def ego_to_map(self, t: float) -> np.ndarray:
        """float64 [4, 4]: ego frame at time t (seconds) to map; the car stands flat on the ground."""
        x, y, yaw = (float(v) for v in self.road.at(self.ego_s(t), -LANE_WIDTH / 2))
        gx, gy = self.waves.gradient(x, y)
        up = np.array([-gx, -gy, 1.0]) / np.sqrt(gx * gx + gy * gy + 1.0)
        ahead = np.array([np.cos(yaw), np.sin(yaw), 0.0])
        ahead -= up * (ahead @ up)
        ahead /= np.linalg.norm(ahead)
        matrix = np.eye(4)
        matrix[:3, :3] = np.stack([ahead, np.cross(up, ahead), up], axis=1)
        matrix[:3, 3] = x, y, self.waves.height(x, y)
        return matrix

    def shapes_at(self, t: float, about: np.ndarray, reach: float = VIEW_DISTANCE) -> ShapeTable:
        """All shapes within ``reach`` metres of the point ``about`` at time t; both in the map frame."""
        poses = self.moving_poses(t)[self._moving_part]
        table = concat_tables([self._static, self._moving_shapes.placed_each(poses)])
        offset = table.centre[:, :2] - np.asarray(about)[:2]
        near = reach + self._radius
        return table.select((offset * offset).sum(axis=1) < near * near)

    def moving_poses(self, t: float) -> np.ndarray:
        """float64 [m, 4]: x, y, z, yaw at time t of the objects that move, in the order of ``moving``."""
        s = np.array([o.pose.s_of_t(t) for o in self.moving])
        x, y, heading = self.road.at(s, self._moving_d)
        return np.stack([x, y, self.waves.height(x, y), heading + self._moving_turn], axis=1)

    @property
    def annotated(self) -> List[ToyObject]:
        """The objects that get boxes."""
        return [o for o in self.objects if o.type is not None]

    # ---- layout ----

    def _draw_look(self) -> Look:
        rng = self._rng
        azimuth, height = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 1.2)
        sun = np.array([np.cos(azimuth) * np.cos(height), np.sin(azimuth) * np.cos(height), np.sin(height)])
        grey = rng.uniform(0.0, 0.5)
        zenith = tuple((1 - grey) * np.array((0.25, 0.45, 0.80)) + grey * np.array((0.62, 0.66, 0.70)))
        horizon = tuple((1 - grey) * np.array((0.75, 0.84, 0.93)) + grey * np.array((0.80, 0.82, 0.84)))
        return Look(sun, zenith, horizon, float(0.75 - 0.45 * grey), float(0.50 + 0.25 * grey))

    def _draw_zones(self) -> List[SideZone]:
        rng, zones = self._rng, []
        for side in (-1, 1):
            s, turn = -80.0, int(rng.integers(6))
            while s < self.road.length + 80.0:
                kind = ('building', 'park', 'building', 'plaza', 'park', 'dirt')[turn % 6]
                turn += 1 if rng.random() < 0.8 else 2
                end = s + rng.uniform(16.0, 26.0)
                zones.append(SideZone(s, end, side, kind))
                s = end
        return zones

    def _furnish(self, zones) -> None:
        for side in (-1, 1):
            self._park_vehicles(side)
            self._fill_sidewalk(side)
        for zone in zones:
            self._fill_zone(zone)
        self._far_buildings()
        self._drive_own_lane()
        self._drive_other_lane()

    def _add(self, shapes, occ_class, pose, type_=None, moving=False) -> None:
        table = make_table(shapes, owner=len(self.objects))
        low, high = extent(table)
        table.centre[:, :2] -= (low[:2] + high[:2]) / 2
        self.objects.append(
            ToyObject(
                len(self.objects),
                CLASS_IDS[occ_class],
                type_,
                table,
                tuple(float(v) for v in high - low),
                float(low[2] + high[2]) / 2,
                pose,
                moving,
            )
        )

    def _stand(self, s, d, turn=0.0) -> Callable[[float], Pose]:
        """Pose of something that stays at road coordinates (s, d), turned against the road's heading."""
        x, y, heading = (float(v) for v in self.road.at(s, d))
        pose = Pose(x, y, float(self.waves.height(x, y)), heading + turn)
        return lambda t: pose

    def _add_object(self, name, pose, moving=False, **options) -> None:
        type_ = objects.OBJECT_TYPES[name]
        shapes = objects.OBJECT_BUILDERS[name](self._rng, **options)
        self._add(shapes, type_.occ_class, pose, type_, moving)

    def _near_crossing(self, s, reach) -> bool:
        return abs(s - self.crossing) < CROSS_STREET_HALF + reach

    def _wanted(self, names, side) -> List[str]:
        """Rare things for this side of the road: each falls to one of the sides, in most scenes."""
        return [
            name
            for k, name in enumerate(names)
            if (self._scene_index + k) % 2 == (side + 1) // 2
            and ((self._scene_index // 2 + k) % 3 != 2 or self._rng.random() < 0.7)
        ]

    def _park_vehicles(self, side) -> None:
        rng, s = self._rng, -60.0
        rare = self._wanted(['work_zone', 'trailer', 'bus', 'truck', 'work_zone'], side)
        room = {'car': 5.2, 'truck': 8.6, 'bus': 12.0, 'trailer': 11.0, 'work_zone': 21.0, 'motorcycle': 2.6, '': 5.0}
        while s < self.road.length + 70.0:
            if rare and s > -14.0:
                name = rare.pop(0)
            else:
                name = str(rng.choice(['car', 'truck', 'motorcycle', ''], p=[0.34, 0.03, 0.05, 0.58]))
            middle = s + room[name] / 2
            if name and not self._near_crossing(middle, 3.0 + room[name] / 2):
                self._place_parked(name, middle, side)
            elif name in ('work_zone', 'trailer', 'bus'):
                rare.insert(0, name)
                s += 4.0 - room[name]
            s += room[name] + rng.uniform(2.0, 5.0)

    def _place_parked(self, name, s, side) -> None:
        turn = 0.0 if side < 0 else np.pi
        if name == 'work_zone':
            self._work_zone(s, side, turn)
        else:
            self._add_object(name, self._stand(s, side * PARKING_CENTRE, turn + self._rng.normal(0, 0.02)))

    def _work_zone(self, s, side, turn) -> None:
        """An excavator behind a row of barriers, cones at both ends."""
        self._add_object('construction_vehicle', self._stand(s, side * 5.95, turn))
        for offset in (-6.0, -2.0, 2.0, 6.0):
            self._add_object('barrier', self._stand(s + offset, side * 4.15, np.pi / 2))
        for offset, d in ((-9.0, 4.3), (-9.4, 6.7), (9.0, 4.3), (9.4, 6.7)):
            self._add_object('traffic_cone', self._stand(s + offset, side * d, self._rng.uniform(0, 3)))

    def _fill_sidewalk(self, side) -> None:
        rng, s = self._rng, -50.0
        rare = self._wanted(['bicycle', 'cart', 'motorcycle', 'debris', 'pedestrian', 'traffic_cone'], side)
        common = ['lamp', 'sign', 'bicycle', 'motorcycle', 'cart', 'debris', 'pedestrian', 'bush', 'traffic_cone']
        while s < self.road.length + 60.0:
            name = rare.pop(0) if rare and s > -8.0 else str(rng.choice(common))
            if not self._near_crossing(s, 4.0):
                self._place_item(name, s, side)
            s += rng.uniform(6.0, 11.0)
        self._walk(side)

    def _place_item(self, name, s, side) -> None:
        facing = 0.0 if side < 0 else np.pi
        spot = self._stand(s, side * ITEM_LANE, facing)
        if name == 'lamp':
            self._add(objects.lamp_post(self._rng), 'manmade', spot)
        elif name == 'sign':
            self._add(objects.sign_post(self._rng), 'manmade', spot)
        elif name == 'bush':
            self._add(objects.bush(self._rng), 'vegetation', spot)
        else:
            self._add_object(name, self._stand(s, side * ITEM_LANE, self._rng.uniform(0, 2 * np.pi)))

    def _walk(self, side) -> None:
        """People who walk one behind the other, all at one pace."""
        rng = self._rng
        pace, turn = (rng.uniform(0.9, 1.5), 0.0) if rng.random() < 0.5 else (-rng.uniform(0.9, 1.5), np.pi)
        s = -40.0 + rng.uniform(0, 4)
        while s < self.road.length + 50.0:
            start = s
            self._add_object(
                'pedestrian',
                Track(self, lambda t, start=start: start + pace * t, side * WALKING_LANE, turn),
                moving=True,
            )
            s += rng.uniform(8.0, 24.0)

    def _fill_zone(self, zone) -> None:
        rng = self._rng
        middle, length = (zone.start + zone.end) / 2, zone.end - zone.start
        if zone.kind == 'building':
            depth, front = rng.uniform(8.0, 12.0), rng.uniform(14.0, 18.0)
            if not self._near_crossing(middle, length / 2 + 1.0):
                shapes = objects.building(rng, 0.85 * length, depth, rng.uniform(4.5, 11.0))
                self._add(shapes, 'manmade', self._stand(middle, zone.side * (front + depth / 2)))
        else:
            self._plant(zone)
            if zone.kind == 'plaza' and not self._near_crossing(middle, length / 2):
                self._add(objects.wall(rng, 0.6 * length), 'manmade', self._stand(middle, zone.side * 22.5))

    def _plant(self, zone) -> None:
        """Trees and bushes in a loose grid."""
        rng = self._rng
        rows = {'park': (13.0, 18.0, 24.0, 31.0), 'dirt': (13.5, 24.0, 30.0), 'plaza': (12.5,)}[zone.kind]
        for d in rows:
            s = zone.start + rng.uniform(1.0, 4.0)
            while s < zone.end - 2.0:
                place = self._stand(s, zone.side * (d + rng.uniform(-1.0, 1.0)), rng.uniform(0, 2 * np.pi))
                kind = int(rng.choice(3, p=[0.70, 0.15, 0.15]))
                builder = (objects.tree, objects.conifer, objects.bush)[kind]
                shapes = builder(rng)
                if not self._near_crossing(s, 4.0):
                    self._add(shapes, 'vegetation', place)
                s += rng.uniform(4.5, 8.0)

    def _far_buildings(self) -> None:
        rng = self._rng
        for side in (-1, 1):
            s = -70.0
            while s < self.road.length + 80.0:
                if rng.random() < 0.6 and not self._near_crossing(s, 14.0):
                    shapes = objects.building(rng, rng.uniform(12, 18), 10.0, rng.uniform(7.0, 18.0))
                    self._add(shapes, 'manmade', self._stand(s, side * rng.uniform(40.0, 48.0)))
                s += 26.0

    def _drive_own_lane(self) -> None:
        """Vehicles ahead of and behind the ego car, at its pace, and a cyclist at the lane's edge."""
        rng = self._rng
        gaps = [rng.uniform(17, 24), rng.uniform(40, 48), -rng.uniform(17, 24), -rng.uniform(40, 50)]
        for gap in gaps:
            name = str(rng.choice(['car', 'motorcycle', 'truck', 'bus'], p=[0.66, 0.16, 0.12, 0.06]))
            wobble = rng.uniform(0, 6)
            self._drive(name, self._follow(gap, wobble), -LANE_WIDTH / 2, 0.0)
        pace, start = rng.uniform(3.5, 5.0), rng.uniform(5.0, 12.0)
        self._drive('bicycle', lambda t: start + pace * t, -(LANE_WIDTH - 0.1), 0.0)

    def _follow(self, gap, wobble):
        """Road coordinate over time of something that keeps about ``gap`` metres ahead of the ego car."""
        return lambda t: self.ego_s(t) + gap + 0.5 * np.sin(0.6 * t + wobble)

    def _drive_other_lane(self) -> None:
        """Oncoming vehicles, all at one pace."""
        rng = self._rng
        pace = rng.uniform(5.0, 8.0)
        s = -50.0 + rng.uniform(0, 10)
        while s < min(self.road.length + pace * self.duration + 70.0, 600.0):
            name = str(rng.choice(['car', 'truck', 'bus', 'motorcycle'], p=[0.65, 0.12, 0.08, 0.15]))
            self._drive(name, lambda t, start=s: start - pace * t, LANE_WIDTH / 2, np.pi)
            s += rng.uniform(24.0, 46.0)

    def _drive(self, name, s_of_t, d, turn) -> None:
        options = dict(rider=True) if name in ('motorcycle', 'bicycle') else {}
        self._add_object(name, Track(self, s_of_t, d, turn), moving=True, **options)

    def _split_static(self) -> None:
        self.moving = [o for o in self.objects if o.moving]
        self._static = concat_tables([o.shapes.placed(*o.pose(0.0)) for o in self.objects if not o.moving])
        self._moving_shapes = concat_tables([o.shapes for o in self.moving])
        self._moving_part = np.repeat(np.arange(len(self.moving)), [len(o.shapes) for o in self.moving])
        self._moving_d = np.array([o.pose.d for o in self.moving])
        self._moving_turn = np.array([o.pose.turn for o in self.moving])
        self._radius = np.concatenate([self._static.radius, self._moving_shapes.radius])
        for o in self.objects:
            if o.type is None and o.size[0] > 5.0 and o.size[1] > 5.0:
                self._clear_floor(o)

    def _clear_floor(self, building) -> None:
        """Mark the ground inside a building, half a metre in from its walls, as NO_GROUND."""
        x, y, _, yaw = building.pose(0.0)
        reach = np.hypot(*building.size[:2]) / 2
        rows, columns = self.ground.shape
        c0, c1 = max(int((x - reach) / CELL), 0), min(int((x + reach) / CELL) + 1, columns)
        r0, r1 = max(int((y - reach) / CELL), 0), min(int((y + reach) / CELL) + 1, rows)
        dx = ((np.arange(c0, c1) + 0.5) * CELL - x)[None, :]
        dy = ((np.arange(r0, r1) + 0.5) * CELL - y)[:, None]
        u, v = dx * np.cos(yaw) + dy * np.sin(yaw), dy * np.cos(yaw) - dx * np.sin(yaw)
        within = (np.abs(u) < building.size[0] / 2 - 0.8) & (np.abs(v) < building.size[1] / 2 - 0.8)
        self.ground[r0:r1, c0:c1][within] = NO_GROUND
