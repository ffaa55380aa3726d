'use strict';
// The cameras' images with the occupancy that projects into them, and the time line.

/** Camera tiles of the sample. */
function updateCameras() {
  const { cameras } = state.sample;
  element('cameras').hidden = !cameras.length;
  element('strip').innerHTML = cameras.map(cameraTile).join('');
  if (element('large').open) showLarge(Number(element('large').dataset.camera));
}

function cameraTile(camera, i) {
  const title = escapeHtml(cameraTitle(camera.name)) + (camera.image ? '' : ' (no image)');
  return `<button type="button" class="camera" data-camera="${i}" title="Larger (look through: ${i + 1})"><figure>
    <div class="picture" style="aspect-ratio:${camera.width}/${camera.height}">
    ${camera.image ? `<img src="${camera.image}" alt="">` : ''}<canvas></canvas></div>
    <figcaption>${title}</figcaption></figure></button>`;
}

const cameraTitle = (name) => name.replace(/^CAM_/, '').replace(/_/g, ' ').toLowerCase();

/** Draw what the last pane shows over an image, `scale` times its size. */
function drawOverlay(canvas, camera, scale = 1) {
  const pane = panes[panes.length - 1];
  if (!pane?.mesh) return;
  const [width, height] = [Math.round(camera.width * scale), Math.round(camera.height * scale)];
  const clip = clipFromImage(camera.imageFromEgo, camera.width, camera.height);
  const eye = mapPoint(camera.egoFromCamera, [0, 0, 0]);
  Object.assign(canvas, { width, height });
  canvas.getContext('2d').putImageData(renderer.drawToImage(pane.mesh, grid, clip, eye, width, height), 0, 0);
}

function updateOverlays() {
  if (!renderer) return;
  element('strip')
    .querySelectorAll('canvas')
    .forEach((canvas, i) => drawOverlay(canvas, state.sample.cameras[i]));
  const large = element('large');
  if (large.open) drawOverlay(large.querySelector('canvas'), state.sample.cameras[large.dataset.camera], 2);
}

/** Open the large picture of a camera. */
function showLarge(index) {
  const { cameras } = state.sample;
  const at = (index + cameras.length) % cameras.length;
  const large = element('large');
  large.dataset.camera = at;
  large.querySelector('.picture').style.aspectRatio = `${cameras[at].width}/${cameras[at].height}`;
  large.querySelector('img').src = cameras[at].image || '';
  large.querySelector('img').hidden = !cameras[at].image;
  element('large-name').textContent = cameraTitle(cameras[at].name);
  drawOverlay(large.querySelector('canvas'), cameras[at], 2);
  if (!large.open) large.showModal();
}

function lookThrough(index) {
  const camera = state.sample.cameras[index];
  if (camera) flyTo(orbit.throughCamera(camera));
}

function highlightCamera(name) {
  if (state.highlighted === name) return;
  state.highlighted = name;
  requestDraw();
}

// ---------------------------------------------------------------------------------------------- time line

/** One bar a sample: its mIoU where there is one, else all alike. */
function makeTimeline() {
  const { samples } = drive;
  element('timeline').hidden = samples.length < 2;
  element('time').max = samples.length - 1;
  element('bars').innerHTML = samples
    .map((s, i) => {
      const isStart = i && s.scene !== samples[i - 1].scene;
      return `<i class="${isStart ? 'scene-start' : ''}" style="height:${s.miou === null ? 30 : 100 * s.miou}%"></i>`;
    })
    .join('');
}

function updateTimeline() {
  const { samples } = drive;
  const now = samples[state.index];
  const first = samples.find((s) => s.scene === now.scene);
  element('time').value = state.index;
  element('bars')
    .querySelectorAll('i')
    .forEach((bar, i) => bar.classList.toggle('now', i === state.index));
  const seconds = now.seconds === null ? '' : ` · ${(now.seconds - first.seconds).toFixed(1)} s`;
  element('clock').textContent = `${state.index + 1} / ${samples.length}${seconds}`;
  element('clock').title = now.miou === null ? '' : `bars: mIoU of each sample; here ${percent(now.miou)}`;
  element('where').textContent = [now.scene, now.token].filter(Boolean).join(' · ');
}

let timer = null;

function setPlaying(playing) {
  state.playing = playing;
  clearTimeout(timer);
  Object.assign(element('play'), {
    textContent: playing ? '❚❚' : '▶',
    title: playing ? 'Pause (space)' : 'Play (space)',
  });
  element('play').setAttribute('aria-label', playing ? 'Pause' : 'Play');
  if (playing) playOn();
}

/** Show the next sample as long after this one as it was recorded (at most 2 s), at the chosen speed. */
function playOn() {
  const { samples } = drive;
  const next = (state.index + 1) % samples.length;
  const recorded = next ? samples[next].seconds - samples[state.index].seconds : 1;
  const pause = (1000 * (recorded > 0 && recorded <= 2 ? recorded : 0.5)) / Number(element('speed').value);
  timer = setTimeout(async () => {
    await showSample(next);
    if (state.playing) playOn();
  }, pause);
}
