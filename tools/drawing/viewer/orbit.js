'use strict';
// The eye that circles a point of the ego frame, and the mouse, fingers and wheel that move it.

const FIELD_OF_VIEW = (42 * Math.PI) / 180; // from top to bottom

/**
 * @property target the point in the middle, metres
 * @property azimuth direction of sight, radians from x towards y; 0 looks ahead
 * @property elevation how steeply the eye looks down, radians
 * @property away distance from the target, metres
 */
class Orbit {
  constructor(grid) {
    this.extent = Math.max(grid.shape[0], grid.shape[1]) * grid.voxelSize;
    Object.assign(this, this.preset('behind', 1.5));
  }

  /** The pose 'above', else the one behind and above the car, for a pane of this width to height. */
  preset(name, aspect) {
    const fit = Math.max(1, (1.5 / aspect) ** 0.6); // step back where the pane is narrow
    if (name === 'above') {
      return {
        target: [0, 0, 0],
        azimuth: 0,
        elevation: Math.PI / 2 - 0.01,
        away: 1.38 * this.extent * Math.max(1, 1 / aspect),
      };
    }
    const elevation = 0.6 + 0.25 * clamp(1.3 - aspect, 0, 1); // a tall pane has room for more ground
    return { target: [-0.07 * this.extent, 0, 0], azimuth: 0, elevation, away: 0.94 * this.extent * fit };
  }

  /** The pose that sits at a camera. */
  throughCamera(camera) {
    const eye = mapPoint(camera.egoFromCamera, [0, 0, 0]);
    const forward = subtract(mapPoint(camera.egoFromCamera, [0, 0, 1]), eye);
    const away = 8;
    return {
      target: addScaled(eye, forward, away),
      azimuth: Math.atan2(forward[1], forward[0]),
      elevation: Math.asin(clamp(-forward[2], -1, 1)),
      away,
    };
  }

  get forward() {
    const level = Math.cos(this.elevation);
    return [level * Math.cos(this.azimuth), level * Math.sin(this.azimuth), -Math.sin(this.elevation)];
  }

  get eye() {
    return addScaled(this.target, this.forward, -this.away);
  }

  clipFromEgo(aspect) {
    const near = Math.max(0.05, this.away / 100);
    return multiply(
      perspective(FIELD_OF_VIEW, aspect, near, this.away + 3 * this.extent),
      lookAlong(this.eye, this.forward),
    );
  }

  /** Direction of the ray through a point of the pane, x and y from -1 to 1. */
  rayThrough(x, y, aspect) {
    const forward = this.forward;
    const right = [Math.sin(this.azimuth), -Math.cos(this.azimuth), 0];
    const up = cross(right, forward);
    const half = Math.tan(FIELD_OF_VIEW / 2);
    return unit(addScaled(addScaled(forward, right, x * half * aspect), up, y * half));
  }

  rotate(dx, dy) {
    this.azimuth -= dx;
    this.elevation = clamp(this.elevation + dy, -0.3, Math.PI / 2 - 0.01);
  }

  /** Move along the ground by shares of the pane's height. */
  move(dx, dy) {
    const scale = 2 * Math.tan(FIELD_OF_VIEW / 2) * this.away;
    const [c, s] = [Math.cos(this.azimuth), Math.sin(this.azimuth)];
    const ahead = (dy * scale) / Math.max(0.35, Math.sin(this.elevation));
    this.target = [
      this.target[0] - dx * scale * s + ahead * c,
      this.target[1] + dx * scale * c + ahead * s,
      this.target[2],
    ];
    const limit = this.extent;
    this.target = this.target.map((v) => clamp(v, -limit, limit));
  }

  /** Come closer (factor < 1) to what is seen along a ray. */
  zoom(factor, ray = this.forward) {
    const before = this.away;
    this.away = clamp(this.away * factor, 2, 6 * this.extent);
    const eye = addScaled(this.target, this.forward, -before);
    if (ray[2] < -0.05) {
      // the ray meets the target's level: keep that point where it is on the screen
      const met = addScaled(eye, ray, (this.target[2] - eye[2]) / ray[2]);
      const share = 1 - this.away / before;
      const shift = subtract(met, this.target);
      if (Math.hypot(...shift) < this.extent) this.target = addScaled(this.target, shift, share);
    }
  }
}

/** Let pointers and the wheel on `canvas` move the orbit; `on` takes changed(), hover(x, y), tap(x, y), leave(). */
function attachPointers(canvas, orbit, rayAt, on) {
  const pointers = new Map();
  let moved = 0;
  let pinch = null;
  const spread = () => {
    const [a, b] = [...pointers.values()];
    return { x: (a.x + b.x) / 2, y: (a.y + b.y) / 2, size: Math.hypot(a.x - b.x, a.y - b.y) };
  };
  canvas.addEventListener('pointerdown', (event) => {
    if (event.isTrusted) canvas.setPointerCapture(event.pointerId); // the self-test's own events have no pointer
    pointers.set(event.pointerId, { x: event.offsetX, y: event.offsetY, moves: event.button !== 0 || event.shiftKey });
    pinch = pointers.size === 2 ? spread() : null;
    moved = pointers.size > 1 ? Infinity : 0;
    canvas.classList.add('dragging');
    on.leave();
  });
  canvas.addEventListener('pointermove', (event) => {
    const pointer = pointers.get(event.pointerId);
    if (!pointer) {
      if (event.pointerType === 'mouse') on.hover(event.offsetX, event.offsetY);
      return;
    }
    const [dx, dy] = [event.offsetX - pointer.x, event.offsetY - pointer.y];
    Object.assign(pointer, { x: event.offsetX, y: event.offsetY });
    const height = canvas.clientHeight;
    moved += Math.abs(dx) + Math.abs(dy);
    if (pinch && pointers.size === 2) {
      const now = spread();
      orbit.move((now.x - pinch.x) / height, (now.y - pinch.y) / height);
      orbit.zoom(pinch.size / Math.max(now.size, 1), rayAt(now.x, now.y));
      pinch = now;
    } else if (pointer.moves) orbit.move(dx / height, dy / height);
    else orbit.rotate((dx / height) * 2.6, (dy / height) * 2);
    on.changed();
  });
  const release = (event) => {
    if (!pointers.delete(event.pointerId)) return;
    pinch = null;
    canvas.classList.toggle('dragging', pointers.size > 0);
    if (moved < 5 && event.type === 'pointerup') on.tap(event.offsetX, event.offsetY);
  };
  for (const type of ['pointerup', 'pointercancel']) canvas.addEventListener(type, release);
  canvas.addEventListener('pointerleave', on.leave);
  canvas.addEventListener('contextmenu', (event) => event.preventDefault());
  canvas.addEventListener(
    'wheel',
    (event) => {
      event.preventDefault();
      const lines = event.deltaMode === 1 ? 16 : 1;
      orbit.zoom(Math.exp(clamp(event.deltaY * lines, -240, 240) * 0.0016), rayAt(event.offsetX, event.offsetY));
      on.changed();
    },
    { passive: false },
  );
}
