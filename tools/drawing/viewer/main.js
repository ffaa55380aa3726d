'use strict';
// Start: connect buttons, keys and pointers; options after the # of the address; the self-test.

/** {mode: 'difference', sample: '3', ...} of #mode=difference&sample=3 */
const options = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));

function connectButtons() {
  element('modes').addEventListener('click', (e) => e.target.dataset.mode && setMode(e.target.dataset.mode));
  element('views').addEventListener('click', (e) => e.target.dataset.view && resetView(e.target.dataset.view));
  element('panel').addEventListener(
    'change',
    (e) => e.target.dataset.kind && switchRow(e.target.dataset.kind, e.target.dataset.key, false),
  );
  element('panel').addEventListener('click', (e) => {
    const { chip, colour, kind, key } = e.target.dataset;
    if (chip) applyChip(chip);
    if (colour) setByInstance(colour === 'instance');
    if (e.target.className === 'only') switchRow(kind, key, true);
  });
  element('mask').addEventListener('change', (e) => {
    state.useMask = e.target.checked;
    rebuild();
  });
  element('frusta').addEventListener('change', (e) => {
    state.frusta = e.target.checked;
    requestDraw();
  });
  element('cut').addEventListener('input', (e) => {
    state.cut = Number(e.target.value);
    rebuild();
  });
  element('theme').addEventListener('click', () => setTheme(isDark() ? 'light' : 'dark'));
  element('overlay').addEventListener('input', (e) =>
    document.documentElement.style.setProperty('--overlay', e.target.value),
  );
  element('time').addEventListener('input', (e) => showSample(Number(e.target.value)));
  element('play').addEventListener('click', () => setPlaying(!state.playing));
  element('previous').addEventListener('click', () => step(-1));
  element('next').addEventListener('click', () => step(1));
  element('help-button').addEventListener('click', () => element('help').showModal());
  element('help-close').addEventListener('click', () => element('help').close());
}

function connectCameras() {
  const strip = element('strip');
  const tileOf = (event) => event.target.closest('[data-camera]');
  strip.addEventListener('click', (e) => tileOf(e) && showLarge(Number(tileOf(e).dataset.camera)));
  strip.addEventListener(
    'pointerover',
    (e) => tileOf(e) && highlightCamera(state.sample.cameras[tileOf(e).dataset.camera].name),
  );
  strip.addEventListener('pointerleave', () => highlightCamera(null));
  const large = element('large');
  large.addEventListener(
    'click',
    (e) => e.target.dataset.step && showLarge(Number(large.dataset.camera) + Number(e.target.dataset.step)),
  );
  element('large-close').addEventListener('click', () => large.close());
  element('look-through').addEventListener('click', () => {
    large.close();
    lookThrough(Number(large.dataset.camera));
  });
}

const step = (by) => showSample((state.index + by + drive.samples.length) % drive.samples.length);

function setByInstance(byInstance) {
  state.byInstance = byInstance;
  rebuild();
}

function resetView(name) {
  flyTo(orbit.preset(name, panes[0].width / panes[0].height));
}

function stepMode(by) {
  const modes = hasModes(state.sample);
  setMode(modes[(modes.indexOf(state.mode) + by + modes.length) % modes.length]);
}

function toggleOverlay() {
  const slider = element('overlay');
  slider.value = Number(slider.value) ? 0 : 0.45;
  slider.dispatchEvent(new Event('input'));
}

const MOVES = { w: [0, 0.08], s: [0, -0.08], a: [0.08, 0], d: [-0.08, 0] };
const KEYS = {
  ' ': () => drive.samples.length > 1 && setPlaying(!state.playing),
  ArrowRight: () => step(1),
  ArrowLeft: () => step(-1),
  m: () => stepMode(1),
  M: () => stepMode(-1),
  c: () => !element('colour-by').hidden && setByInstance(!state.byInstance),
  g: () => applyChip('ground'),
  f: () => {
    state.frusta = !state.frusta;
    updateDisplay();
    requestDraw();
  },
  o: toggleOverlay,
  l: () => setTheme(isDark() ? 'light' : 'dark'),
  r: () => resetView('behind'),
  v: () => resetView('above'),
  q: () => {
    orbit.rotate(0.12, 0);
    requestDraw();
  },
  e: () => {
    orbit.rotate(-0.12, 0);
    requestDraw();
  },
  '+': () => {
    orbit.zoom(0.85);
    requestDraw();
  },
  '=': () => {
    orbit.zoom(0.85);
    requestDraw();
  },
  '-': () => {
    orbit.zoom(1 / 0.85);
    requestDraw();
  },
  '?': () => element('help').showModal(),
};

function connectKeys() {
  document.addEventListener('keydown', (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || element('help').open) return;
    const large = element('large');
    if (large.open) {
      if (event.key.startsWith('Arrow'))
        showLarge(Number(large.dataset.camera) + (event.key === 'ArrowRight' ? 1 : -1));
      return;
    }
    const takesKeys =
      event.target.matches('input[type=range], select') ||
      (event.key === ' ' && event.target.matches('button, input, summary'));
    if (takesKeys) return;
    const lower = event.key.toLowerCase();
    if (MOVES[lower] && event.key === lower) {
      orbit.move(...MOVES[lower]);
      requestDraw();
    } else if (KEYS[event.key]) KEYS[event.key]();
    else if (/^[1-9]$/.test(event.key)) lookThrough(Number(event.key) - 1);
    else return;
    event.preventDefault();
  });
}

function start3d() {
  const canvas = element('scene');
  orbit = new Orbit(grid);
  try {
    renderer = new Renderer(canvas);
  } catch (error) {
    Object.assign(element('message'), { textContent: error.message, hidden: false });
    return;
  }
  fitCanvas(1);
  attachPointers(canvas, orbit, rayAt, { changed: requestDraw, hover: pick, tap: pick, leave: unpick });
  canvas.addEventListener('dblclick', (e) => {
    const hit = pick(e.offsetX, e.offsetY);
    if (!hit) return;
    const target = hit.index.map((v, axis) => grid.rangeMin[axis] + (v + 0.5) * grid.voxelSize);
    flyTo({ target, azimuth: orbit.azimuth, elevation: orbit.elevation, away: Math.max(6, orbit.away * 0.5) });
  });
  canvas.addEventListener('webglcontextlost', () => {
    Object.assign(element('message'), {
      textContent: 'The graphics driver has dropped this page; reload it.',
      hidden: false,
    });
  });
  new ResizeObserver(requestDraw).observe(canvas);
}

async function start() {
  const prefersDark = matchMedia('(prefers-color-scheme: dark)');
  setTheme(options.theme || (prefersDark.matches ? 'dark' : 'light'));
  if (!options.theme) prefersDark.addEventListener('change', (e) => setTheme(e.matches ? 'dark' : 'light'));
  start3d();
  connectButtons();
  connectCameras();
  connectKeys();
  makeTimeline();
  if (options.mode in MODES) state.mode = options.mode;
  else if (drive.samples.some((s) => s.miou !== null)) state.mode = 'both';
  state.byInstance = options.colour === 'instance';
  await showSample(Number(options.sample) || 0);
  Object.assign(orbit, orbit.preset(options.view, panes[0].width / panes[0].height));
  if (options.camera) {
    const camera = state.sample.cameras.find((c) => c.name === options.camera);
    if (camera) Object.assign(orbit, orbit.throughCamera(camera));
  }
  requestDraw();
}

start()
  .then(() => options.selftest !== undefined && reportSelfTest())
  .catch((error) => {
    Object.assign(element('message'), { textContent: `The page cannot be shown: ${error.message}`, hidden: false });
    document.body.dataset.report = JSON.stringify({ error: String(error.stack || error) });
  });
