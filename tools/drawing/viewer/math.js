'use strict';
// Vectors and matrices. A vector is an array of 3 numbers; a matrix has 16, column after column, as WebGL has them.
// Frames: ego is x forward, y left, z up, in metres; clip is WebGL's.

const subtract = (a, b) => [a[0] - b[0], a[1] - b[1], a[2] - b[2]];
const addScaled = (a, b, factor) => [a[0] + b[0] * factor, a[1] + b[1] * factor, a[2] + b[2] * factor];
const cross = (a, b) => [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]];
const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
const unit = (a) => addScaled([0, 0, 0], a, 1 / (Math.hypot(...a) || 1));
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

/** a · b */
function multiply(a, b) {
  const product = new Float32Array(16);
  for (let column = 0; column < 4; column++) {
    for (let row = 0; row < 4; row++) {
      let sum = 0;
      for (let k = 0; k < 4; k++) sum += a[k * 4 + row] * b[column * 4 + k];
      product[column * 4 + row] = sum;
    }
  }
  return product;
}

/** Clip coordinates [4] of a point. */
function transform(matrix, p) {
  return [0, 1, 2, 3].map(
    (row) => matrix[row] * p[0] + matrix[4 + row] * p[1] + matrix[8 + row] * p[2] + matrix[12 + row],
  );
}

/** A camera that opens `angle` radians from top to bottom. */
function perspective(angle, aspect, near, far) {
  const f = 1 / Math.tan(angle / 2);
  return new Float32Array([
    f / aspect,
    0,
    0,
    0,
    0,
    f,
    0,
    0,
    0,
    0,
    (far + near) / (near - far),
    -1,
    0,
    0,
    (2 * far * near) / (near - far),
    0,
  ]);
}

/** From ego to a camera at `eye` that looks along `forward` (a unit vector), z up. */
function lookAlong(eye, forward) {
  const upwards = Math.abs(forward[2]) > 0.999999 ? [1, 0, 0] : [0, 0, 1];
  const right = unit(cross(forward, upwards));
  const up = cross(right, forward);
  return new Float32Array([
    right[0],
    up[0],
    -forward[0],
    0,
    right[1],
    up[1],
    -forward[1],
    0,
    right[2],
    up[2],
    -forward[2],
    0,
    -dot(right, eye),
    -dot(up, eye),
    dot(forward, eye),
    1,
  ]);
}

/**
 * Clip coordinates from a camera's own projection, so that WebGL draws exactly over its image.
 * @param rows 4x4, row after row: ego to (u·d, v·d, d, 1), u and v in pixels, d the depth in metres.
 */
function clipFromImage(rows, width, height, near = 0.5, far = 200) {
  const clip = new Float32Array(16);
  const scale = (far + near) / (far - near);
  for (let column = 0; column < 4; column++) {
    const [u, v, depth] = [rows[column], rows[4 + column], rows[8 + column]];
    clip[column * 4] = (2 / width) * u - depth;
    clip[column * 4 + 1] = depth - (2 / height) * v;
    clip[column * 4 + 2] = scale * depth - (column === 3 ? (2 * far * near) / (far - near) : 0);
    clip[column * 4 + 3] = depth;
  }
  return clip;
}

/** Point mapped by a rigid 4x4 given row after row. */
function mapPoint(rows, p) {
  return [0, 4, 8].map((r) => rows[r] * p[0] + rows[r + 1] * p[1] + rows[r + 2] * p[2] + rows[r + 3]);
}

/** Inverse of mapPoint. */
function unmapPoint(rows, p) {
  const moved = subtract(p, [rows[3], rows[7], rows[11]]);
  return [0, 1, 2].map((c) => rows[c] * moved[0] + rows[4 + c] * moved[1] + rows[8 + c] * moved[2]);
}
