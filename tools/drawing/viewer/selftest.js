'use strict';
// With #selftest the page tries itself and writes what it found to <body data-report="{...}">.

const tick = () => new Promise((resolve) => setTimeout(resolve, 0));

/** What the canvas shows: share of pixels that differ from the background, and the number of colours. */
function readScene() {
  const { gl } = renderer;
  draw();
  const { width, height } = gl.canvas;
  const pixels = new Uint32Array(width * height);
  gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, new Uint8Array(pixels.buffer));
  const [r, g, b] = cssColour('--scene');
  const background = ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
  return {
    filled: pixels.reduce((sum, p) => sum + (p !== background), 0) / pixels.length,
    colours: new Set(pixels).size,
    glError: gl.getError(),
  };
}

/** Share of each camera's overlay that voxels cover. */
function readOverlays() {
  return [...element('strip').querySelectorAll('canvas')].map((canvas) => {
    const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
    let covered = 0;
    for (let i = 3; i < data.length; i += 4) covered += data[i] > 0;
    return covered / (data.length / 4);
  });
}

/** Milliseconds a frame, the eye turning: of this thread alone, and until the pixels are there. */
function timeFrames(frames) {
  const { gl } = renderer;
  let script = 0;
  const begin = performance.now();
  for (let i = 0; i < frames; i++) {
    orbit.rotate((2 * Math.PI) / frames, 0);
    const before = performance.now();
    draw();
    script += performance.now() - before;
    gl.readPixels(0, 0, 1, 1, gl.RGBA, gl.UNSIGNED_BYTE, new Uint8Array(4));
  }
  return { script: script / frames, whole: (performance.now() - begin) / frames };
}

/** Send the page what fingers, mouse and keys would, and say what came of it. */
async function tryInput() {
  const canvas = element('scene');
  const box = canvas.getBoundingClientRect();
  const pose = () => ({
    target: [...orbit.target],
    azimuth: orbit.azimuth,
    elevation: orbit.elevation,
    away: orbit.away,
  });
  const point = (type, id, x, y, more = {}) =>
    canvas.dispatchEvent(
      new PointerEvent(type, {
        pointerId: id,
        clientX: box.left + x * box.width,
        clientY: box.top + y * box.height,
        bubbles: true,
        ...more,
      }),
    );
  const after = (act) => {
    const before = pose();
    act();
    const now = pose();
    return {
      azimuth: now.azimuth - before.azimuth,
      elevation: now.elevation - before.elevation,
      moved: Math.hypot(...subtract(now.target, before.target)),
      zoomed: now.away / before.away,
    };
  };
  const key = (name) =>
    document.body.dispatchEvent(new KeyboardEvent('keydown', { key: name, bubbles: true, cancelable: true }));
  const drag = (more) => {
    point('pointerdown', 1, 0.5, 0.5, more);
    point('pointermove', 1, 0.6, 0.55);
    point('pointerup', 1, 0.6, 0.55);
  };
  const result = {
    drag: after(() => drag({})),
    shiftDrag: after(() => drag({ shiftKey: true })),
    pinch: after(() => {
      point('pointerdown', 1, 0.4, 0.5);
      point('pointerdown', 2, 0.6, 0.5);
      point('pointermove', 1, 0.3, 0.5);
      point('pointermove', 2, 0.7, 0.5);
      point('pointerup', 1, 0.3, 0.5);
      point('pointerup', 2, 0.7, 0.5);
    }),
    wheel: after(() =>
      canvas.dispatchEvent(
        new WheelEvent('wheel', {
          deltaY: -100,
          clientX: box.left + box.width / 2,
          clientY: box.top + box.height / 2,
          cancelable: true,
        }),
      ),
    ),
    keys: after(() => {
      key('w');
      key('q');
      key('+');
    }),
  };
  const [mode, theme, token] = [state.mode, isDark(), state.sample.token];
  key('m');
  key('l');
  result.mode = [mode, state.mode];
  result.theme = [theme, isDark()];
  key('ArrowRight');
  await new Promise((resolve) => setTimeout(resolve, 200));
  result.token = [token, state.sample.token];
  return result;
}

/** Voxels shown after each switch of the legend and the display. */
function trySwitches() {
  const shown = (act) => {
    act();
    return panes[0].voxels;
  };
  const first = panes[0].name;
  const result = {
    things: shown(() => applyChip('things')),
    none: shown(() => applyChip('none')),
    all: shown(() => applyChip('all')),
  };
  result.withoutGround = shown(() => applyChip('ground'));
  applyChip('all');
  if (state.sample[first].instances) {
    const [nearest] = listInstances(grid, state.sample[first], null);
    result.nearest = nearest;
    result.withoutNearest = shown(() => switchRow('instance', `${first} ${nearest.id}`, false));
    result.nearestAlone = shown(() => switchRow('instance', `${first} ${nearest.id}`, true));
    state.hiddenInstances.clear();
  }
  result.lowestLayer = shown(() => {
    state.cut = 1;
    rebuild();
  });
  state.cut = grid.shape[2];
  result.masked = shown(() => {
    state.useMask = true;
    rebuild();
  });
  state.useMask = false;
  rebuild();
  return result;
}

/** Token of the sample that is shown after playing for a while. */
async function tryPlaying() {
  await showSample(0);
  setPlaying(true);
  await new Promise((resolve) => setTimeout(resolve, 1500));
  setPlaying(false);
  return state.sample.token;
}

async function selfTest() {
  const report = {
    samples: drive.samples.length,
    modes: {},
    overlays: readOverlays(),
    overflow: document.documentElement.scrollWidth - window.innerWidth,
  };
  for (const mode of hasModes(state.sample)) {
    const begin = performance.now();
    setMode(mode);
    report.modes[mode] = {
      build: performance.now() - begin,
      panes: panes.map(({ voxels, faces }) => ({ voxels, faces })),
      ...readScene(),
      summary: element('summary').innerText,
    };
    await tick();
  }
  if (report.modes.difference) {
    setMode('difference');
    report.kinds = Array.from(comparisonOf(state.sample).all.kinds);
    report.ious = drive.classes.map((_, c) => comparisonOf(state.sample).all.iou(c));
    report.offsets = comparedItems(state.sample, 'offset').map((item) => item.count);
    report.rings = comparisonOf(state.sample).rings.map((ring) => Array.from(ring.kinds));
  }
  const first = hasModes(state.sample)[0];
  setMode(first);
  const all = panes[0].voxels;
  const most = countClasses(grid, state.sample[first].semantics, null);
  const largest = most.indexOf(Math.max(...most));
  switchRow('class', String(largest), false);
  report.withoutLargest = { before: all, after: panes[0].voxels, of: most[largest] };
  switchRow('class', String(largest), false);
  report.restored = panes[0].voxels;
  const { clientWidth, clientHeight } = element('scene');
  report.picked = pick(clientWidth / 2, clientHeight * 0.6) && element('tip').innerText;
  report.switches = trySwitches();
  report.input = await tryInput();
  report.played = await tryPlaying();
  report.frame = timeFrames(Number(options.frames) || 20);
  await showSample(drive.samples.length - 1);
  report.last = { token: state.sample.token, ...readScene() };
  setTheme(isDark() ? 'light' : 'dark');
  report.otherTheme = readScene();
  return report;
}

async function reportSelfTest() {
  const report = renderer ? await selfTest() : { error: element('message').textContent };
  document.body.dataset.report = JSON.stringify(report);
  document.title = report.error ? 'self-test: failed' : 'self-test: done';
}
