'use strict';
// Volumes: unpacking, comparing, and the faces that are drawn. A volume is a typed array [X, Y, Z], z fastest.

const IGNORE = 255; // label of voxels that count nowhere
const KINDS = ['correct', 'wrong class', 'missed', 'not there'];
const [CORRECT, WRONG_CLASS, MISSED, NOT_THERE] = [1, 2, 3, 4]; // 0: nothing to compare
const OFFSETS = [0, 1, 2, 4, Infinity]; // metres, upper ends; 1, 2 and 4 m are the tolerances of RayIoU
const OFFSET_NAMES = ['in place', 'up to 1 m off', 'up to 2 m off', 'up to 4 m off', 'more than 4 m off'];
const RING_METRES = 10;

/** Bytes of a base64 text that was compressed with gzip. */
async function unpack(text) {
  const packed = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream('gzip'));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** {semantics, instances, mask} of a packed volume; the latter two are null where there are none. */
async function unpackVolume(packed) {
  if (!packed) return null;
  const [semantics, instances, mask] = await Promise.all(
    ['semantics', 'instances', 'mask'].map((name) => (packed[name] ? unpack(packed[name]) : null)),
  );
  return { semantics, instances: instances && new Uint16Array(instances.buffer), mask };
}

/** Distance ring (0 is nearest) of every column [X, Y], by the distance of its middle from the ego. */
function columnRings(grid) {
  const [nx, ny] = grid.shape;
  const rings = new Uint8Array(nx * ny);
  for (let x = 0; x < nx; x++) {
    for (let y = 0; y < ny; y++) {
      const away = Math.hypot(
        grid.rangeMin[0] + (x + 0.5) * grid.voxelSize,
        grid.rangeMin[1] + (y + 0.5) * grid.voxelSize,
      );
      rings[x * ny + y] = Math.min(254, Math.floor(away / RING_METRES));
    }
  }
  return rings;
}

/** Counts of one class, or of one ring and class: voxels that agree, in the truth, in the prediction. */
class Counts {
  constructor(numClasses) {
    this.both = new Uint32Array(numClasses);
    this.truth = new Uint32Array(numClasses);
    this.prediction = new Uint32Array(numClasses);
    this.kinds = new Uint32Array(KINDS.length + 1);
  }

  /** Intersection over union of a class; NaN where neither side has it. */
  iou(c) {
    return this.both[c] / (this.truth[c] + this.prediction[c] - this.both[c]);
  }

  /** Mean over the classes that occur. */
  meanIou() {
    const values = Array.from(this.both, (_, c) => this.iou(c)).filter((v) => !Number.isNaN(v));
    return values.reduce((sum, v) => sum + v, 0) / values.length;
  }

  /** Occupied or not, whatever the class. */
  occupiedIou() {
    const [, correct, wrong, missed, notThere] = this.kinds;
    return (correct + wrong) / (correct + wrong + missed + notThere);
  }
}

/**
 * What a prediction has right and wrong, voxel by voxel.
 * @param mask voxels that count, or null for all. Voxels whose truth is IGNORE never count.
 * @returns {kinds: Uint8Array volume, all: Counts, rings: [Counts]}
 */
function compareVolumes(grid, truth, prediction, mask) {
  const { numClasses } = grid;
  const depth = grid.shape[2];
  const columns = columnRings(grid);
  const kinds = new Uint8Array(truth.length);
  const all = new Counts(numClasses);
  const rings = [];
  for (let i = 0; i < truth.length; i++) {
    const [t, p] = [truth[i], prediction[i]];
    const [isThere, isPredicted] = [t < numClasses, p < numClasses];
    if (t === IGNORE || p === IGNORE || (mask && !mask[i]) || !(isThere || isPredicted)) continue;
    const kind = !isPredicted ? MISSED : !isThere ? NOT_THERE : t === p ? CORRECT : WRONG_CLASS;
    kinds[i] = kind;
    const ring = columns[Math.floor(i / depth)];
    while (rings.length <= ring) rings.push(new Counts(numClasses));
    for (const counts of [all, rings[ring]]) {
      counts.kinds[kind]++;
      if (isThere) counts.truth[t]++;
      if (isPredicted) counts.prediction[p]++;
      if (kind === CORRECT) counts.both[t]++;
    }
  }
  return { kinds, all, rings };
}

/** Voxels per class of one volume, under a mask. */
function countClasses(grid, semantics, mask) {
  const counts = new Uint32Array(256);
  for (let i = 0; i < semantics.length; i++) if (!mask || mask[i]) counts[semantics[i]]++;
  return counts.subarray(0, grid.numClasses);
}

/** Squared distance, in voxels, of every voxel from the nearest one that `is(i)`; exact, one axis after the other. */
function squaredDistances(shape, is) {
  const [nx, ny, nz] = shape;
  const far = 1e6;
  const field = new Float32Array(nx * ny * nz);
  for (let i = 0; i < field.length; i++) field[i] = is(i) ? 0 : far;
  const longest = Math.max(nx, ny, nz);
  const [line, roots, starts] = [new Float32Array(longest), new Int32Array(longest), new Float32Array(longest + 1)];
  const alongLine = (first, step, n) => {
    // lower envelope of the parabolas that stand on the line's values
    let last = 0;
    for (let i = 0; i < n; i++) line[i] = field[first + i * step];
    roots[0] = 0;
    starts[0] = -Infinity;
    starts[1] = Infinity;
    for (let i = 1; i < n; i++) {
      let meet;
      do {
        const r = roots[last];
        meet = (line[i] + i * i - line[r] - r * r) / (2 * (i - r));
      } while (meet <= starts[last] && --last >= 0);
      roots[++last] = i;
      starts[last] = meet;
      starts[last + 1] = Infinity;
    }
    for (let i = 0, k = 0; i < n; i++) {
      while (starts[k + 1] < i) k++;
      field[first + i * step] = (i - roots[k]) ** 2 + line[roots[k]];
    }
  };
  for (let x = 0; x < nx; x++) for (let y = 0; y < ny; y++) alongLine((x * ny + y) * nz, 1, nz);
  for (let x = 0; x < nx; x++) for (let z = 0; z < nz; z++) alongLine(x * ny * nz + z, nz, ny);
  for (let y = 0; y < ny; y++) for (let z = 0; z < nz; z++) alongLine(y * nz + z, ny * nz, nx);
  return field;
}

/**
 * How far off each voxel is, as 1 + index into OFFSETS; 0 where there is nothing to compare.
 * A predicted voxel is measured to the nearest true one of any class, a missed one to the nearest predicted one.
 */
function offsetsOf(grid, truth, prediction, kinds) {
  const isThere = (i) => truth[i] < grid.numClasses;
  const isPredicted = (i) => prediction[i] < grid.numClasses;
  const [toTruth, toPrediction] = [squaredDistances(grid.shape, isThere), squaredDistances(grid.shape, isPredicted)];
  const offsets = new Uint8Array(kinds.length);
  for (let i = 0; i < kinds.length; i++) {
    if (!kinds[i]) continue;
    const metres = Math.sqrt(kinds[i] === MISSED ? toPrediction[i] : toTruth[i]) * grid.voxelSize;
    offsets[i] = 1 + OFFSETS.findIndex((end) => metres <= end + 1e-4);
  }
  return offsets;
}

/** [{id, classId, voxels, centre}] of a volume's instances, nearest first; centre in metres. */
function listInstances(grid, volume, mask) {
  const found = new Map();
  const [, ny, nz] = grid.shape;
  for (let i = 0; i < volume.instances.length; i++) {
    const id = volume.instances[i];
    if (!id || volume.semantics[i] >= grid.numClasses || (mask && !mask[i])) continue;
    if (!found.has(id)) found.set(id, { id, voxels: 0, sum: [0, 0, 0], classes: new Map() });
    const one = found.get(id);
    const index = [Math.floor(i / (ny * nz)), Math.floor(i / nz) % ny, i % nz];
    one.voxels++;
    one.sum = addScaled(one.sum, index, 1);
    one.classes.set(volume.semantics[i], (one.classes.get(volume.semantics[i]) || 0) + 1);
  }
  const list = Array.from(found.values(), ({ id, voxels, sum, classes }) => ({
    id,
    voxels,
    classId: Array.from(classes).sort((a, b) => b[1] - a[1])[0][0],
    centre: sum.map((s, axis) => grid.rangeMin[axis] + (s / voxels + 0.5) * grid.voxelSize),
  }));
  return list.sort((a, b) => Math.hypot(...a.centre) - Math.hypot(...b.centre));
}

/** Map from predicted to true instance ids where they overlap by more than half (IoU > 0.5, so never twice). */
function matchInstances(truth, prediction) {
  const [overlap, sizeOfTrue, sizeOfPredicted] = [new Map(), new Map(), new Map()];
  const add = (map, key) => map.set(key, (map.get(key) || 0) + 1);
  for (let i = 0; i < truth.length; i++) {
    if (truth[i]) add(sizeOfTrue, truth[i]);
    if (prediction[i]) add(sizeOfPredicted, prediction[i]);
    if (truth[i] && prediction[i]) add(overlap, prediction[i] * 65536 + truth[i]);
  }
  const matches = new Map();
  for (const [pair, both] of overlap) {
    const [p, t] = [Math.floor(pair / 65536), pair % 65536];
    if (both / (sizeOfTrue.get(t) + sizeOfPredicted.get(p) - both) > 0.5) matches.set(p, t);
  }
  return matches;
}

/**
 * The faces of the shown voxels that no shown voxel covers, by side (+x -x +y -y +z -z).
 *
 * A face is two uint32: x | y << 10 | z << 20 | side << 28, and colour key | shade of its corners << 16. The shade
 * of a corner, 0 (dark) to 3, says how many neighbours crowd around it.
 * @param keys Uint16Array volume: colour key of each voxel, 0 = not shown.
 * @returns {data: Uint32Array, ranges: [[first face, faces]] by side, voxels: number shown}
 */
function buildFaces(shape, keys) {
  const [nx, ny, nz] = shape;
  const stride = [(ny + 2) * (nz + 2), nz + 2, 1]; // of a copy with an empty rim, so that no neighbour is outside
  const solid = new Uint8Array((nx + 2) * stride[0]);
  let voxels = 0;
  for (let x = 0, i = 0; x < nx; x++) {
    for (let y = 0; y < ny; y++) {
      for (let z = 0, p = (x + 1) * stride[0] + (y + 1) * stride[1] + 1; z < nz; z++, i++, p++) {
        if (keys[i]) voxels += solid[p] = 1;
      }
    }
  }
  const data = new Uint32Array(voxels * 12);
  const ranges = [];
  let faces = 0;
  for (let side = 0; side < 6; side++) {
    const axis = side >> 1;
    const outwards = side & 1 ? -stride[axis] : stride[axis];
    // u, v and the way out form a right-handed frame, so that corners run anticlockwise seen from outside.
    const [u, v] =
      side & 1 ? [stride[(axis + 2) % 3], stride[(axis + 1) % 3]] : [stride[(axis + 1) % 3], stride[(axis + 2) % 3]];
    const first = faces;
    for (let x = 0, i = 0; x < nx; x++) {
      for (let y = 0; y < ny; y++) {
        for (let z = 0, p = (x + 1) * stride[0] + (y + 1) * stride[1] + 1; z < nz; z++, i++, p++) {
          if (!solid[p] || solid[p + outwards] || (side === 5 && z === 0)) continue; // nobody looks from below
          data[2 * faces] = (x | (y << 10) | (z << 20) | (side << 28)) >>> 0;
          data[2 * faces + 1] = (keys[i] | (cornerShades(solid, p + outwards, u, v) << 16)) >>> 0;
          faces++;
        }
      }
    }
    ranges.push([first, faces - first]);
  }
  return { data: data.subarray(0, 2 * faces), ranges, voxels, faces };
}

/** Two bits for each corner (u + 2 v) of a face: 3 less one for each voxel that touches it in front. */
function cornerShades(solid, front, u, v) {
  let bits = 0;
  for (let corner = 0; corner < 4; corner++) {
    const [du, dv] = [corner & 1 ? u : -u, corner & 2 ? v : -v];
    const [a, b] = [solid[front + du], solid[front + dv]];
    bits |= (a && b ? 0 : 3 - a - b - solid[front + du + dv]) << (2 * corner);
  }
  return bits;
}

/** First shown voxel that a ray meets: {index: [x, y, z], flat, away (metres)} or null. */
function castRay(grid, keys, origin, direction) {
  const [nx, ny, nz] = grid.shape;
  const size = grid.shape;
  const start = origin.map((o, a) => (o - grid.rangeMin[a]) / grid.voxelSize);
  let [enter, leave] = [0, Infinity];
  for (let a = 0; a < 3; a++) {
    // part of the ray inside the volume
    const ends = [-start[a] / direction[a], (size[a] - start[a]) / direction[a]].sort((p, q) => p - q);
    enter = Math.max(enter, ends[0]);
    leave = Math.min(leave, ends[1]);
  }
  if (!(enter < leave)) return null;
  const at = addScaled(start, direction, enter + 1e-4);
  const cell = at.map((v, a) => clamp(Math.floor(v), 0, size[a] - 1));
  const step = direction.map(Math.sign);
  const next = cell.map((c, a) => (step[a] ? (c + (step[a] > 0 ? 1 : 0) - start[a]) / direction[a] : Infinity));
  for (let travelled = enter; travelled < leave;) {
    const flat = (cell[0] * ny + cell[1]) * nz + cell[2];
    if (keys[flat]) return { index: cell, flat, away: travelled * grid.voxelSize };
    const a = next[0] < next[1] ? (next[0] < next[2] ? 0 : 2) : next[1] < next[2] ? 1 : 2;
    travelled = next[a];
    cell[a] += step[a];
    if (cell[a] < 0 || cell[a] >= [nx, ny, nz][a]) return null;
    next[a] += Math.abs(1 / direction[a]);
  }
  return null;
}
