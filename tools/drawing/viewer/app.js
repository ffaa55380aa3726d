'use strict';
// The page: its state, what is drawn for a mode, and the loop that draws it.

const drive = JSON.parse(document.getElementById('drive').textContent);
const grid = { ...drive.grid, numClasses: drive.classes.length };
const INSTANCE_KEY = 256; // colour keys: class + 1, or INSTANCE_KEY + instance; 0 is not shown
const MODES = {
  truth: { label: 'Truth', needs: ['truth'] },
  prediction: { label: 'Prediction', needs: ['prediction'] },
  both: { label: 'Side by side', needs: ['truth', 'prediction'] },
  difference: { label: 'Difference', needs: ['truth', 'prediction'], compares: true },
  distance: { label: 'Error by distance', needs: ['truth', 'prediction'], compares: true },
  offset: { label: 'How far off', needs: ['truth', 'prediction'], compares: true },
};
const element = (id) => document.getElementById(id);

const state = {
  index: 0,
  sample: null,
  mode: 'truth',
  byInstance: false,
  hiddenClasses: new Set(),
  hiddenKeys: { difference: new Set(), distance: new Set(), offset: new Set() },
  hiddenInstances: new Set(), // 'truth 12'
  useMask: false,
  cut: grid.shape[2], // layers below this are shown
  frusta: true,
  highlighted: null, // name of a camera
  picked: null,
  playing: false,
};
let renderer = null;
let orbit = null;
let panes = []; // [{name, title, keys, mesh, x, y, width, height}], pixels from the lower left

// ---------------------------------------------------------------------------------------------- samples

const cache = new Map();

/** A sample with its volumes unpacked; the latest dozen are kept. */
function loadSample(index) {
  if (!cache.has(index)) {
    const packed = JSON.parse(element(`sample-${index}`).textContent);
    const unpacked = Promise.all([unpackVolume(packed.truth), unpackVolume(packed.prediction)]);
    cache.set(
      index,
      unpacked.then(([truth, prediction]) => prepareSample({ ...packed, truth, prediction })),
    );
    if (cache.size > 12) cache.delete(cache.keys().next().value);
  }
  return cache.get(index);
}

/** Add what only depends on the sample: colours of its instances, such that matched ones are alike on both sides. */
function prepareSample(sample) {
  const { truth, prediction } = sample;
  const matches =
    truth?.instances && prediction?.instances ? matchInstances(truth.instances, prediction.instances) : new Map();
  const highest = truth?.instances ? truth.instances.reduce((a, b) => Math.max(a, b), 0) : 0;
  sample.matches = matches;
  sample.colourId = { truth: (id) => id, prediction: (id) => matches.get(id) || highest + id };
  sample.comparisons = {};
  return sample;
}

const maskOf = (sample) => (state.useMask && sample.truth ? sample.truth.mask : null);

/** The comparison of a sample under the mask in use, made once. */
function comparisonOf(sample) {
  const name = state.useMask ? 'masked' : 'all';
  if (!sample.comparisons[name]) {
    sample.comparisons[name] = compareVolumes(
      grid,
      sample.truth.semantics,
      sample.prediction.semantics,
      maskOf(sample),
    );
  }
  return sample.comparisons[name];
}

/** Values 1.. by voxel that a comparing mode colours by. */
function comparedValues(sample, mode) {
  const comparison = comparisonOf(sample);
  if (mode === 'difference') return comparison.kinds;
  if (mode === 'offset') {
    comparison.offsets =
      comparison.offsets || offsetsOf(grid, sample.truth.semantics, sample.prediction.semantics, comparison.kinds);
    return comparison.offsets;
  }
  if (!comparison.ringValues) {
    // 1 right, else 2 + ring
    const columns = columnRings(grid);
    comparison.ringValues = comparison.kinds.map((kind, i) =>
      kind > CORRECT ? 2 + columns[Math.floor(i / grid.shape[2])] : kind,
    );
  }
  return comparison.ringValues;
}

const hasModes = (sample) => Object.keys(MODES).filter((mode) => MODES[mode].needs.every((role) => sample[role]));

// ---------------------------------------------------------------------------------------------- colours

const themeColours = new Map();

/** A colour of the style sheet, [r, g, b]; looked up once a theme. */
function cssColour(name) {
  if (!themeColours.has(name)) {
    const hex = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    themeColours.set(
      name,
      [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)),
    );
  }
  return themeColours.get(name);
}

const isDark = () => document.documentElement.dataset.theme === 'dark';
const mix = (a, b, share) => a.map((v, i) => Math.round(v + (b[i] - v) * share));
const toCss = (rgb) => `rgb(${rgb.join(' ')})`;

/** A class's colour; on dark paper the darkest are lifted. */
function classColour(c) {
  const rgb = drive.classes[c].colour;
  const bright = 0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2];
  return isDark() && bright < 75 ? mix(rgb, [255, 255, 255], ((75 - bright) / 180) * 0.9) : rgb;
}

/** Far-apart hues for successive ids. */
function instanceColour(id) {
  const [hue, level] = [(0.61803398875 * id) % 1, id % 3];
  const [saturation, value] = [0.9 - 0.15 * level, 0.95 - 0.12 * level];
  return [5, 3, 1].map((n) => {
    const k = (n + hue * 6) % 6;
    return Math.round(255 * (value - value * saturation * clamp(Math.min(k, 4 - k), 0, 1)));
  });
}

/** Where instances have the colours, classes step back. */
const mutedColour = (c) => mix(mix(classColour(c), [150, 150, 150], 0.75), cssColour('--scene'), 0.3);

/** From little (0) to everything (1) wrong. */
function errorColour(share) {
  const ramp = [
    [252, 222, 110],
    [245, 140, 50],
    [214, 48, 56],
    [168, 32, 120],
    [98, 28, 140],
  ];
  const at = clamp(share, 0, 0.999) * (ramp.length - 1);
  return mix(ramp[Math.floor(at)], ramp[Math.floor(at) + 1], at % 1);
}

/** Names, colours and counts of the values that a comparing mode colours by: [{key, label, colour, count}]. */
function comparedItems(sample, mode) {
  const { all, rings } = comparisonOf(sample);
  const correct = cssColour('--correct');
  if (mode === 'difference') {
    const colours = [correct, cssColour('--wrong'), cssColour('--missed'), cssColour('--not-there')];
    return KINDS.map((label, i) => ({ key: i + 1, label, colour: colours[i], count: all.kinds[i + 1] }));
  }
  const values = comparedValues(sample, mode);
  const counts = new Uint32Array(260);
  for (let i = 0; i < values.length; i++) counts[values[i]]++;
  if (mode === 'offset') {
    const colours = [correct, ...[0.05, 0.28, 0.52, 0.8].map(errorColour)];
    return OFFSET_NAMES.map((label, i) => ({ key: i + 1, label, colour: colours[i], count: counts[i + 1] }));
  }
  return [{ key: 1, label: 'correct', colour: correct, count: counts[1] }].concat(
    rings.map((ring, r) => ({
      key: 2 + r,
      label: `wrong, ${r * RING_METRES}–${(r + 1) * RING_METRES} m`,
      colour: errorColour(1 - ring.both.reduce((a, b) => a + b, 0) / ring.kinds.reduce((a, b) => a + b, 0)),
      count: counts[2 + r],
    })),
  );
}

/** RGBA by colour key for a pane. */
function paletteOf(sample, pane) {
  const entries = new Map();
  if (MODES[pane].compares) for (const { key, colour } of comparedItems(sample, pane)) entries.set(key, colour);
  else {
    const byInstance = state.byInstance && sample[pane].instances;
    drive.classes.forEach((_, c) => entries.set(c + 1, (byInstance ? mutedColour : classColour)(c)));
    if (byInstance) {
      for (const id of new Set(sample[pane].instances)) {
        const colourId = sample.colourId[pane](id);
        if (id) entries.set(INSTANCE_KEY + colourId, instanceColour(colourId));
      }
    }
  }
  const palette = new Uint8Array((Math.max(0, ...entries.keys()) + 1) * 4);
  for (const [key, rgb] of entries) palette.set([...rgb, 255], key * 4);
  return palette;
}

// ---------------------------------------------------------------------------------------------- meshes

const classIsShown = () =>
  Uint8Array.from({ length: 256 }, (_, c) => (c < grid.numClasses && !state.hiddenClasses.has(c) ? 1 : 0));

/** Colour keys of a volume as the switches want it. */
function volumeKeys(sample, role) {
  const { semantics, instances } = sample[role];
  const [mask, shown, depth] = [maskOf(sample), classIsShown(), grid.shape[2]];
  const keys = new Uint16Array(semantics.length);
  const keyOfInstance = new Map();
  const instanceKey = (id, key) => {
    // 0 hides
    if (!keyOfInstance.has(id)) {
      const hidden = state.hiddenInstances.has(`${role} ${id}`);
      keyOfInstance.set(id, hidden ? 0 : state.byInstance ? INSTANCE_KEY + sample.colourId[role](id) : -1);
    }
    const found = keyOfInstance.get(id);
    return found < 0 ? key : found;
  };
  for (let i = 0; i < semantics.length; i++) {
    const c = semantics[i];
    if (!shown[c] || (mask && !mask[i]) || i % depth >= state.cut) continue;
    keys[i] = instances && instances[i] ? instanceKey(instances[i], c + 1) : c + 1;
  }
  return keys;
}

/** Colour keys of a comparison: a voxel is shown if its true or its predicted class is. */
function comparedKeys(sample, mode) {
  const [values, hidden, shown, depth] = [
    comparedValues(sample, mode),
    state.hiddenKeys[mode],
    classIsShown(),
    grid.shape[2],
  ];
  const keys = new Uint16Array(values.length);
  for (let i = 0; i < values.length; i++) {
    const value = values[i];
    if (!value || i % depth >= state.cut || hidden.has(value)) continue;
    if (shown[sample.truth.semantics[i]] || shown[sample.prediction.semantics[i]]) keys[i] = value;
  }
  return keys;
}

/** Make the panes of the mode anew, then everything that shows them. */
function rebuild() {
  const { sample } = state;
  for (const pane of panes) if (pane.mesh) renderer.deleteMesh(pane.mesh);
  const names = state.mode === 'both' ? ['truth', 'prediction'] : [state.mode];
  panes = names.map((name) => {
    const keys = MODES[name].compares ? comparedKeys(sample, name) : volumeKeys(sample, name);
    const faces = buildFaces(grid.shape, keys);
    return {
      name,
      keys,
      faces: faces.faces,
      voxels: faces.voxels,
      mesh: renderer && renderer.makeVoxelMesh(faces, paletteOf(sample, name)),
    };
  });
  layOutPanes();
  state.picked = null;
  element('tip').hidden = true;
  updatePanel();
  updateOverlays();
  requestDraw();
}

/** Colours alone have changed. */
function recolour() {
  for (const pane of panes) if (pane.mesh) renderer.setPalette(pane.mesh, paletteOf(state.sample, pane.name));
  updatePanel();
  updateOverlays();
  requestDraw();
}

// ---------------------------------------------------------------------------------------------- drawing

const CAR = boxTriangles([
  // nuScenes' ego frame sits below the rear axle
  { low: [-0.95, -0.92, 0.25], high: [3.55, 0.92, 0.95], colour: [0.95, 0.96, 0.98] },
  {
    low: [-0.8, -0.88, 0.95],
    high: [2.3, 0.88, 1.55],
    lowTop: [-0.3, -0.7],
    highTop: [1.5, 0.7],
    colour: [0.25, 0.29, 0.35],
  },
]);
const FRUSTUM_METRES = 1.6;

/** Corners of a camera's view at some depth, ego frame, clockwise from the upper left; the eye last. */
function frustumCorners(camera) {
  const { focal, centre } = camera;
  const corner = (u, v) =>
    mapPoint(camera.egoFromCamera, [
      ((u - centre[0]) / focal[0]) * FRUSTUM_METRES,
      ((v - centre[1]) / focal[1]) * FRUSTUM_METRES,
      FRUSTUM_METRES,
    ]);
  const [w, h] = [camera.width, camera.height];
  return [corner(0, 0), corner(w, 0), corner(w, h), corner(0, h), mapPoint(camera.egoFromCamera, [0, 0, 0])];
}

function frustumLines() {
  const lines = new Lines();
  if (!state.frusta) return lines;
  const [ink, accent] = [cssColour('--ink'), cssColour('--accent')];
  for (const camera of state.sample.cameras) {
    const corners = frustumCorners(camera);
    const [rgb, alpha] = camera.name === state.highlighted ? [accent, 1] : [ink, 0.3];
    lines.path([...corners.slice(0, 4), corners[0]], rgb, alpha);
    for (const c of corners.slice(0, 4)) lines.add(corners[4], c, rgb, alpha);
  }
  return lines;
}

/** The drive's poses around this sample, as a path on the ground of its ego frame. */
function pathLines() {
  const lines = new Lines();
  const here = state.sample;
  if (!here.globalFromEgo) return lines;
  const accent = cssColour('--accent');
  const points = drive.samples
    .filter((s) => s.scene === here.scene && s.position)
    .map((s) => addScaled(unmapPoint(here.globalFromEgo, s.position), [0, 0, 1], 0.3));
  lines.path(points, accent, 0.9);
  for (const p of points)
    lines.path(
      [-1, 1, 1, -1, -1].map((d, i) => addScaled(p, [d, [1, 1, -1, -1, 1][i], 0], 0.3)),
      accent,
      0.9,
    );
  return lines;
}

/** The outline of the volume and, for errors by distance, its rings. */
function groundLines() {
  const lines = new Lines();
  const soft = cssColour('--soft');
  const low = grid.rangeMin;
  const high = low.map((v, axis) => v + grid.shape[axis] * grid.voxelSize);
  const z = low[2];
  lines.path(
    [
      [low[0], low[1], z],
      [high[0], low[1], z],
      [high[0], high[1], z],
      [low[0], high[1], z],
      [low[0], low[1], z],
    ],
    soft,
    0.7,
  );
  if (state.mode !== 'distance') return lines;
  const ink = cssColour('--ink');
  for (let r = RING_METRES; r < Math.hypot(high[0], high[1]); r += RING_METRES) {
    const point = (i) => [r * Math.cos((i * Math.PI) / 90), r * Math.sin((i * Math.PI) / 90), 0.4];
    const inside = (p) => p[0] > low[0] && p[0] < high[0] && p[1] > low[1] && p[1] < high[1];
    for (let i = 0; i < 180; i++)
      if (inside(point(i)) && inside(point(i + 1))) lines.add(point(i), point(i + 1), ink, 0.8);
  }
  return lines;
}

function pickedLines(pane) {
  const lines = new Lines();
  if (state.picked?.pane !== pane.name) return lines;
  const corner = (extra) => state.picked.index.map((v, axis) => grid.rangeMin[axis] + (v + extra) * grid.voxelSize);
  lines.box(corner(0), corner(1), cssColour('--ink'));
  return lines;
}

/** Give each pane its part of the canvas; two lie side by side, or one above the other on a tall canvas. */
function layOutPanes() {
  const { width, height } = element('scene');
  const stacked = height > width;
  panes.forEach((pane, i) => {
    const n = panes.length;
    pane.width = stacked ? width : Math.floor(width / n);
    pane.height = stacked ? Math.floor(height / n) : height;
    pane.x = stacked ? 0 : i * Math.ceil(width / n);
    pane.y = stacked ? (n - 1 - i) * Math.ceil(height / n) : 0;
  });
}

/** The pane under a point of the canvas (CSS pixels), and where in it: x and y from -1 to 1. */
function paneAt(x, y) {
  const canvas = element('scene');
  const scale = canvas.width / canvas.clientWidth;
  const [px, py] = [x * scale, canvas.height - y * scale];
  const pane = panes.find((p) => px >= p.x && px < p.x + p.width && py >= p.y && py < p.y + p.height) || panes[0];
  return { pane, x: ((px - pane.x) / pane.width) * 2 - 1, y: ((py - pane.y) / pane.height) * 2 - 1 };
}

function rayAt(x, y) {
  const at = paneAt(x, y);
  return orbit.rayThrough(at.x, at.y, at.pane.width / at.pane.height);
}

function draw() {
  if (!renderer || !panes.length) return;
  layOutPanes();
  const background = cssColour('--scene');
  const width = Math.max(1, element('scene').width / element('scene').clientWidth);
  const sets = [
    [groundLines(), 1.2, 0.12],
    [pathLines(), 2, 0.35],
    [frustumLines(), 1.2, 0.25],
  ];
  for (const pane of panes) {
    const clip = orbit.clipFromEgo(pane.width / pane.height);
    renderer.beginPane(pane, background);
    renderer.drawVoxels(pane.mesh, grid, clip, orbit.eye, background, orbit.away + orbit.extent);
    renderer.drawCar(CAR, clip);
    for (const [lines, pixels, behind] of sets) renderer.drawLines(lines, clip, pane, pixels * width, behind);
    renderer.drawLines(pickedLines(pane), clip, pane, 2 * width, 0.6);
  }
  placeLabels();
}

/** Text over the canvas: titles of two panes, scores of the rings. */
function placeLabels() {
  const [labels, canvas] = [element('labels'), element('scene')];
  const scale = canvas.clientWidth / canvas.width;
  labels.replaceChildren();
  const add = (text, name, left, top) => {
    const label = labels.appendChild(document.createElement('span'));
    Object.assign(label, { textContent: text, className: name });
    Object.assign(label.style, { left: `${left}px`, top: `${top}px` });
  };
  for (const pane of panes) {
    const [left, top] = [pane.x * scale, (canvas.height - pane.y - pane.height) * scale];
    if (panes.length > 1) add(MODES[pane.name].label, 'pane', left + 10, top + 52);
    if (pane.name !== 'distance') continue;
    const clip = orbit.clipFromEgo(pane.width / pane.height);
    comparisonOf(state.sample).rings.forEach((ring, r) => {
      const away = (r + 0.5) * RING_METRES;
      const p = transform(clip, [away, 0, 0.4]);
      if (p[3] < 0.1 || away > grid.rangeMin[0] + grid.shape[0] * grid.voxelSize) return;
      const [x, y] = [(p[0] / p[3] + 1) / 2, (1 - p[1] / p[3]) / 2];
      add(`IoU ${percent(ring.occupiedIou())}`, 'ring', left + x * pane.width * scale, top + y * pane.height * scale);
    });
  }
}

// The loop draws only when something changed. While frames follow each other slowly it draws fewer pixels.
let isRequested = false;
let lastDrawn = 0;
let quality = 1;
let slowFrames = 0;
let settle = null;

function requestDraw() {
  if (isRequested) return;
  isRequested = true;
  requestAnimationFrame((now) => {
    isRequested = false;
    const since = now - lastDrawn;
    lastDrawn = now;
    if (since < 250) slowFrames = since > 24 ? slowFrames + 1 : Math.max(0, slowFrames - 1);
    if (slowFrames > 8 && quality > 0.5) [quality, slowFrames] = [quality * 0.8, 0];
    fitCanvas(quality);
    draw();
    clearTimeout(settle);
    if (quality < 1)
      settle = setTimeout(() => {
        fitCanvas(1);
        draw();
      }, 300);
  });
}

function fitCanvas(share) {
  const canvas = element('scene');
  const scale = Math.min(window.devicePixelRatio || 1, 2) * share;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight].map((v) => Math.max(1, Math.round(v * scale)));
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
}

/** Move the eye to a pose, in a third of a second. */
function flyTo(pose) {
  const from = { target: orbit.target, azimuth: orbit.azimuth, elevation: orbit.elevation, away: orbit.away };
  const turn = ((pose.azimuth - from.azimuth + 3 * Math.PI) % (2 * Math.PI)) - Math.PI;
  const begin = performance.now();
  const length = matchMedia('(prefers-reduced-motion: reduce)').matches ? 1 : 350;
  const step = (now) => {
    const linear = clamp((now - begin) / length, 0, 1);
    const t = linear * linear * (3 - 2 * linear);
    orbit.target = mix3(from.target, pose.target, t);
    orbit.azimuth = from.azimuth + turn * t;
    orbit.elevation = from.elevation + (pose.elevation - from.elevation) * t;
    orbit.away = from.away * (pose.away / from.away) ** t;
    requestDraw();
    if (linear < 1) requestAnimationFrame(step);
  };
  step(performance.now());
}

const mix3 = (a, b, t) => a.map((v, i) => v + (b[i] - v) * t);

// ---------------------------------------------------------------------------------------------- state

async function showSample(index) {
  const sample = await loadSample(clamp(index, 0, drive.samples.length - 1));
  state.index = index;
  state.sample = sample;
  state.hiddenInstances.clear();
  const possible = hasModes(sample);
  if (!possible.includes(state.mode)) state.mode = possible[0];
  updateModes();
  updateTimeline();
  updateCameras();
  rebuild();
  if (index + 1 < drive.samples.length) loadSample(index + 1);
}

function setMode(mode) {
  if (!hasModes(state.sample).includes(mode)) return;
  state.mode = mode;
  updateModes();
  rebuild();
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  themeColours.clear();
  if (state.sample) recolour();
}
