'use strict';
// The legend: scores, classes, instances, errors by distance; and what a voxel under the pointer is.

const number = (value) => value.toLocaleString('en');
const percent = (share) => (Number.isNaN(share) ? '–' : `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`);
const escapeHtml = (text) =>
  String(text).replace(/[&<>"]/g, (c) => ({ '&': '&amp;', '<': '&lt;', '>': '&gt;', '"': '&quot;' })[c]);
const className = (c) => drive.classes[c]?.name.replace(/_/g, ' ') ?? (c === IGNORE ? 'ignored' : 'free');
const swatch = (rgb) => rgb && `<span class="swatch" style="background:${toCss(rgb)}"></span>`;

function updatePanel() {
  updateSummary();
  updateLegend();
  updateChart();
  updateInstances();
  updateDisplay();
}

function updateModes() {
  const possible = hasModes(state.sample);
  element('modes').innerHTML = possible
    .map(
      (mode) => `<button type="button" role="radio" data-mode="${mode}"
    aria-checked="${mode === state.mode}">${MODES[mode].label}</button>`,
    )
    .join('');
  element('modes').hidden = possible.length < 2;
  element('modes').querySelector('[aria-checked="true"]')?.scrollIntoView({ block: 'nearest', inline: 'nearest' });
}

/** Scores where there is something to compare, else how much there is. */
function updateSummary() {
  const { sample, mode } = state;
  const figures = [];
  const tile = (value, label) => figures.push(`<div><b>${value}</b><small>${label}</small></div>`);
  if (sample.truth && sample.prediction && mode !== 'truth' && mode !== 'prediction') {
    const { all } = comparisonOf(sample);
    tile(percent(all.meanIou()), 'mIoU over classes');
    tile(percent(all.occupiedIou()), 'IoU of occupied');
    const which = state.useMask ? 'the voxels that the cameras see' : 'all voxels';
    element('summary').innerHTML = `<div class="figures">${figures.join('')}</div>
      <p class="note">Voxel IoU of this sample over ${which}. Not RayIoU.</p>`;
    return;
  }
  for (const pane of panes) tile(number(pane.voxels), 'voxels shown');
  const instances = sample[panes[0].name]?.instances;
  if (instances) tile(number(new Set(instances).size - 1), 'instances');
  element('summary').innerHTML = `<div class="figures">${figures.join('')}</div>`;
}

/** Numbers at the end of a row; from the third on they are short. */
const numberCells = (values) =>
  values.map((value, i) => `<span class="number ${i > 1 ? 'short' : ''}">${value}</span>`).join('');

/** One row that switches something on and off. */
function row(kind, key, isShown, colour, label, numbers, only = true) {
  const [name, data] = [escapeHtml(label), `data-kind="${kind}" data-key="${escapeHtml(key)}"`];
  return `<div class="row ${isShown ? '' : 'off'}"><label>
    <input type="checkbox" ${data} ${isShown ? 'checked' : ''}>${swatch(colour) || ''}
    <span class="name" title="${name}">${name}</span></label>
    ${only ? `<button type="button" class="only" ${data}>only</button>` : ''}${numberCells(numbers)}</div>`;
}

function updateLegend() {
  const { sample, mode } = state;
  let html = '';
  if (MODES[mode].compares) {
    const items = comparedItems(sample, mode);
    const total = items.reduce((sum, item) => sum + item.count, 0);
    html += `<h2>${mode === 'offset' ? 'How far off (nearest voxel of any class)' : 'Voxels'}</h2>`;
    html += items
      .map((item) =>
        row(
          'value',
          item.key,
          !state.hiddenKeys[mode].has(item.key),
          item.colour,
          item.label,
          [number(item.count), percent(item.count / total)],
          false,
        ),
      )
      .join('');
    html += '<h2>Classes shown</h2>';
  } else html += '<h2>Classes</h2>';
  const chips = { all: 'all', none: 'none', things: 'things' };
  if (drive.classes.some((c) => c.ground)) chips.ground = 'no ground';
  const chip = ([name, text]) => `<button type="button" data-chip="${name}">${text}</button>`;
  html += `<div class="chips">${Object.entries(chips).map(chip).join('')}</div>`;
  element('legend').innerHTML = html + classRows(sample, mode);
}

/** Classes with the voxels of each side; classes of which there are none come last, in one line. */
function classRows(sample, mode) {
  const roles = mode === 'truth' || mode === 'prediction' ? [mode] : ['truth', 'prediction'];
  const counts = roles.map((role) => countClasses(grid, sample[role].semantics, maskOf(sample)));
  const scores = roles.length === 2 ? comparisonOf(sample).all : null;
  const heads = roles.map((role) => (role === 'truth' ? 'truth' : 'pred.')).concat(scores ? ['IoU'] : []);
  const head = `<div class="row head"><span class="name"></span>${numberCells(heads)}</div>`;
  const byInstance = state.byInstance && panes.some((pane) => sample[pane.name]?.instances);
  const colour = (c) => (MODES[mode].compares ? null : (byInstance ? mutedColour : classColour)(c));
  const present = drive.classes.map((_, c) => c).filter((c) => counts.some((of) => of[c]));
  const absent = drive.classes.filter((_, c) => !present.includes(c)).map((c) => c.name.replace(/_/g, ' '));
  const rows = present.map((c) =>
    row('class', c, !state.hiddenClasses.has(c), colour(c), className(c), [
      ...counts.map((of) => number(of[c])),
      ...(scores ? [percent(scores.iou(c))] : []),
    ]),
  );
  return (
    head + rows.join('') + (absent.length ? `<p class="note">None here: ${escapeHtml(absent.join(', '))}.</p>` : '')
  );
}

/** Right and wrong by distance from the ego. */
function updateChart() {
  const { sample, mode } = state;
  if (!MODES[mode].compares) {
    element('chart').innerHTML = '';
    return;
  }
  const colours = ['--correct', '--wrong', '--missed', '--not-there'];
  const dot = (name) => `<span class="swatch small" style="background:var(${name})"></span>`;
  const rows = comparisonOf(sample).rings.map((ring, r) => {
    const total = ring.kinds.reduce((a, b) => a + b, 0);
    const part = (name, i) => {
      const count = ring.kinds[i + 1];
      const style = `width:${(100 * count) / total}%;background:var(${name})`;
      return `<span style="${style}" title="${KINDS[i]}: ${number(count)}"></span>`;
    };
    return `<div class="ring-row"><span>${r * RING_METRES}–${(r + 1) * RING_METRES} m</span>
      <span class="bar">${colours.map(part).join('')}</span>
      <span>${percent(ring.occupiedIou())}</span><span>${percent(ring.meanIou())}</span></div>`;
  });
  element('chart').innerHTML = `<h2>By distance from the car</h2>
    <div class="ring-row head"><span></span><span></span><span>IoU</span><span>mIoU</span></div>${rows.join('')}
    <p class="note">${colours.map((name, i) => `${dot(name)} ${KINDS[i]}`).join(' &nbsp; ')}</p>`;
}

function updateInstances() {
  const { sample } = state;
  const roles = panes.map((pane) => pane.name).filter((name) => sample[name]?.instances);
  element('instances').hidden = !roles.length;
  if (!roles.length) return;
  const matched = sample.matches.size ? ` · ${sample.matches.size} matched` : '';
  const parts = roles.map((role) => {
    const list = listInstances(grid, sample[role], maskOf(sample));
    const rows = list.map((one) =>
      row(
        'instance',
        `${role} ${one.id}`,
        !state.hiddenInstances.has(`${role} ${one.id}`),
        state.byInstance ? instanceColour(sample.colourId[role](one.id)) : classColour(one.classId),
        className(one.classId),
        [`${Math.round(Math.hypot(...one.centre))} m`, number(one.voxels)],
      ),
    );
    return `<h2>${MODES[role].label}: ${list.length}</h2><div class="row head"><span class="name"></span>
      <span class="number">away</span><span class="number">voxels</span></div>${rows.join('')}`;
  });
  const scrolled = element('instances').querySelector('.list')?.scrollTop || 0;
  element('instances').innerHTML = `<summary>Instances${matched}</summary><div class="list">${parts.join('')}</div>`;
  element('instances').querySelector('.list').scrollTop = scrolled;
}

function updateDisplay() {
  const { sample } = state;
  element('colour-by').hidden = MODES[state.mode].compares || !panes.some((pane) => sample[pane.name]?.instances);
  for (const button of element('colour-by').querySelectorAll('[data-colour]')) {
    button.setAttribute('aria-checked', String((button.dataset.colour === 'instance') === state.byInstance));
  }
  element('mask-setting').hidden = !sample.truth?.mask;
  element('mask').checked = state.useMask;
  element('frusta').checked = state.frusta;
  element('frusta').closest('label').hidden = !sample.cameras.length;
  Object.assign(element('cut'), { max: grid.shape[2], value: state.cut });
  element('cut-text').textContent =
    state.cut < grid.shape[2] ? `${(grid.rangeMin[2] + state.cut * grid.voxelSize).toFixed(1)} m` : '(off)';
}

// ---------------------------------------------------------------------------------------------- switching

/** A row was ticked or its "only" pressed: `set` holds what is hidden, `all` what could be. */
function switchOne(set, all, key, only) {
  const isSolo = all.every((other) => set.has(other) !== (other === key));
  if (only) {
    set.clear();
    if (!isSolo) for (const other of all) if (other !== key) set.add(other);
  } else if (!set.delete(key)) set.add(key);
  rebuild();
}

function switchRow(kind, key, only) {
  if (kind === 'class')
    switchOne(
      state.hiddenClasses,
      drive.classes.map((_, c) => c),
      Number(key),
      only,
    );
  if (kind === 'value')
    switchOne(
      state.hiddenKeys[state.mode],
      comparedItems(state.sample, state.mode).map((i) => i.key),
      Number(key),
      only,
    );
  if (kind === 'instance') {
    const role = key.split(' ')[0];
    const all = listInstances(grid, state.sample[role], null).map((one) => `${role} ${one.id}`);
    switchOne(state.hiddenInstances, all, key, only);
  }
}

function applyChip(chip) {
  const hide = (is) => drive.classes.forEach((one, c) => is(one) && state.hiddenClasses.add(c));
  const groundIsHidden = drive.classes.every((one, c) => !one.ground || state.hiddenClasses.has(c));
  if (chip === 'ground') {
    if (groundIsHidden) drive.classes.forEach((one, c) => one.ground && state.hiddenClasses.delete(c));
    else hide((one) => one.ground);
  } else {
    state.hiddenClasses.clear();
    if (chip === 'none') hide(() => true);
    if (chip === 'things') hide((one) => !one.thing);
  }
  rebuild();
}

// ---------------------------------------------------------------------------------------------- voxel

/** Say what the voxel at a point of the canvas is. */
function pick(x, y) {
  const { pane } = paneAt(x, y);
  const hit = state.sample && castRay(grid, pane.keys, orbit.eye, rayAt(x, y));
  const tip = element('tip');
  const before = state.picked;
  state.picked = hit && { ...hit, pane: pane.name };
  tip.hidden = !hit;
  if (hit) {
    tip.innerHTML = describeVoxel(hit, pane.name);
    const stage = element('stage');
    tip.style.left = `${clamp(x + 14, 4, stage.clientWidth - tip.offsetWidth - 4)}px`;
    tip.style.top = `${y + tip.offsetHeight + 26 > stage.clientHeight ? y - tip.offsetHeight - 12 : y + 16}px`;
  }
  if (before?.flat !== hit?.flat) requestDraw();
  return hit;
}

function unpick() {
  element('tip').hidden = true;
  if (!state.picked) return;
  state.picked = null;
  requestDraw();
}

function describeVoxel({ index, flat }, paneName) {
  const { sample } = state;
  const centre = index.map((v, axis) => grid.rangeMin[axis] + (v + 0.5) * grid.voxelSize);
  const of = (role) => {
    const [c, id] = [sample[role].semantics[flat], sample[role].instances?.[flat]];
    return escapeHtml(className(c)) + (id ? ` #${id}` : '');
  };
  const lines = [];
  if (MODES[paneName].compares) {
    const kind = comparisonOf(sample).kinds[flat];
    lines.push(`<b>${KINDS[kind - 1]}</b>`, `truth: ${of('truth')}`, `prediction: ${of('prediction')}`);
  } else lines.push(`<b>${swatch(classColour(sample[paneName].semantics[flat]))}${of(paneName)}</b>`);
  const [x, y, z] = centre.map((v) => v.toFixed(1));
  const away = Math.hypot(centre[0], centre[1]).toFixed(1);
  lines.push(`<small>x ${x}, y ${y}, z ${z} m · ${away} m away</small>`);
  return lines.map((line) => `<div>${line}</div>`).join('');
}
