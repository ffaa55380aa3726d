'use strict';
// Drawing with WebGL 2: voxels, lines of any width, and the ego car.
//
// Voxels are drawn as their visible faces, each four vertices that look their face up in a texture: one long draw
// call a side, which is much faster than an instance a face or a voxel where instances are costly.

const VOXEL_VERTEX = `#version 300 es
precision highp float;
precision highp usampler2D;
uniform usampler2D faces; // see buildFaces
uniform mat4 clipFromEgo;
uniform vec3 rangeMin;
uniform vec3 eye;
uniform float voxelSize;
uniform float fogEnd;
uniform sampler2D palette;
flat out vec3 colour;
out vec2 onFace;
out float light;
out float fog;

const float LIGHT[6] = float[6](0.74, 0.86, 0.70, 0.64, 1.0, 0.5); // the sun is high, a little behind

void main() {
  int number = gl_VertexID >> 2;
  uvec2 face = texelFetch(faces, ivec2(number & 2047, number >> 11), 0).xy;
  uint side = (face.x >> 28u) & 7u;
  int axis = int(side >> 1u);
  bool outwards = (side & 1u) == 0u;
  int shades[4];
  for (int i = 0; i < 4; i++) shades[i] = int((face.y >> uint(16 + 2 * i)) & 3u);
  // The diagonal between the triangles joins corners 1 and 2; it is to join the two brighter corners of the face.
  int order[4] = int[4](0, 1, 2, 3);
  if (shades[0] + shades[3] > shades[1] + shades[2]) order = int[4](1, 3, 0, 2);
  int corner = order[gl_VertexID & 3];
  onFace = vec2(corner & 1, corner >> 1);

  vec3 position = vec3(face.x & 1023u, (face.x >> 10u) & 1023u, (face.x >> 20u) & 255u);
  int u = outwards ? (axis + 1) % 3 : (axis + 2) % 3;
  int v = outwards ? (axis + 2) % 3 : (axis + 1) % 3;
  position[axis] += outwards ? 1.0 : 0.0;
  position[u] += onFace.x;
  position[v] += onFace.y;
  position = rangeMin + position * voxelSize;

  uint key = face.y & 65535u;
  colour = texelFetch(palette, ivec2(key & 255u, key >> 8u), 0).rgb;
  light = LIGHT[side] * (0.55 + 0.15 * float(shades[corner]));
  fog = 0.35 * smoothstep(0.25, 1.0, distance(position, eye) / fogEnd);
  gl_Position = clipFromEgo * vec4(position, 1.0);
}`;

const VOXEL_FRAGMENT = `#version 300 es
precision highp float;
flat in vec3 colour;
in vec2 onFace;
in float light;
in float fog;
uniform vec3 background;
out vec4 result;

void main() {
  vec2 perPixel = fwidth(onFace);
  vec2 toEdge = min(onFace, 1.0 - onFace) / perPixel; // pixels
  float line = 1.0 - smoothstep(0.4, 1.4, min(toEdge.x, toEdge.y));
  float large = 1.0 - smoothstep(0.08, 0.22, max(perPixel.x, perPixel.y)); // no lines on voxels of a few pixels
  result = vec4(mix(colour * light * (1.0 - 0.2 * line * large), background, fog), 1.0);
}`;

const LINE_VERTEX = `#version 300 es
precision highp float;
layout(location = 0) in vec3 start;
layout(location = 1) in vec3 end;
layout(location = 2) in vec4 tint;
uniform mat4 clipFromEgo;
uniform vec2 viewport; // pixels
uniform float width; // pixels
out vec4 colour;

void main() {
  vec4 a = clipFromEgo * vec4(start, 1.0);
  vec4 b = clipFromEgo * vec4(end, 1.0);
  const float NEAR = 0.2; // cut off what lies behind the eye
  if (a.w < NEAR && b.w > NEAR) a = mix(a, b, (NEAR - a.w) / (b.w - a.w));
  if (b.w < NEAR && a.w > NEAR) b = mix(b, a, (NEAR - b.w) / (a.w - b.w));
  vec2 along = (b.xy / b.w - a.xy / a.w) * viewport;
  along = length(along) > 1e-6 ? normalize(along) : vec2(1.0, 0.0);
  vec2 across = vec2(-along.y, along.x) * ((gl_VertexID & 1) == 0 ? 1.0 : -1.0);
  vec4 p = (gl_VertexID & 2) == 0 ? a : b;
  gl_Position = vec4(p.xy + across * width / viewport * p.w, p.z - 2e-5 * p.w, p.w);
  colour = tint;
}`;

const LINE_FRAGMENT = `#version 300 es
precision highp float;
in vec4 colour;
uniform float opacity;
out vec4 result;

void main() {
  result = vec4(colour.rgb * colour.a, colour.a) * opacity;
}`;

const SOLID_VERTEX = `#version 300 es
precision highp float;
layout(location = 0) in vec3 position;
layout(location = 1) in vec3 normal;
layout(location = 2) in vec3 tint;
uniform mat4 clipFromEgo;
out vec3 colour;

void main() {
  colour = tint * (0.75 + 0.25 * dot(normal, normalize(vec3(-0.4, 0.25, 1.0))));
  gl_Position = clipFromEgo * vec4(position, 1.0);
}`;

const SOLID_FRAGMENT = `#version 300 es
precision highp float;
in vec3 colour;
out vec4 result;

void main() {
  result = vec4(colour, 1.0);
}`;

const FACES_A_ROW = 2048; // of the texture

/** Boxes as triangles: Float32Array of position, normal and colour (0..1) by vertex. */
function boxTriangles(boxes) {
  const numbers = [];
  for (const { low, high, lowTop, highTop, colour } of boxes) {
    // Corner bits: 1 x, 2 y, 4 z; the upper corners may lie elsewhere, as those of a cabin do.
    const [top0, top1] = [lowTop || low, highTop || high];
    const corners = Array.from({ length: 8 }, (_, i) => [
      (i & 4 ? (i & 1 ? top1 : top0) : i & 1 ? high : low)[0],
      (i & 4 ? (i & 2 ? top1 : top0) : i & 2 ? high : low)[1],
      i & 4 ? high[2] : low[2],
    ]);
    for (const quad of [
      [1, 3, 5, 7],
      [2, 0, 6, 4],
      [3, 2, 7, 6],
      [0, 1, 4, 5],
      [4, 5, 6, 7],
    ]) {
      const [a, b, c, d] = quad.map((i) => corners[i]);
      const normal = unit(cross(subtract(b, a), subtract(c, a)));
      for (const p of [a, b, c, b, d, c]) numbers.push(...p, ...normal, ...colour);
    }
  }
  return new Float32Array(numbers);
}

/** Line segments of one kind; colours are [r, g, b] 0..255, alpha 0..1. */
class Lines {
  constructor() {
    this.numbers = [];
  }

  add(from, to, rgb, alpha = 1) {
    this.numbers.push(...from, ...to, rgb[0] / 255, rgb[1] / 255, rgb[2] / 255, alpha);
  }

  path(points, rgb, alpha = 1) {
    for (let i = 1; i < points.length; i++) this.add(points[i - 1], points[i], rgb, alpha);
  }

  box(low, high, rgb, alpha = 1) {
    const corner = (i) => [0, 1, 2].map((axis) => ((i >> axis) & 1 ? high : low)[axis]);
    for (let i = 0; i < 8; i++) {
      for (const bit of [1, 2, 4]) if (!(i & bit)) this.add(corner(i), corner(i | bit), rgb, alpha);
    }
  }
}

/** Everything that talks to WebGL. Meshes are made once and drawn often. */
class Renderer {
  constructor(canvas) {
    const gl = canvas.getContext('webgl2', { antialias: true, alpha: false, powerPreference: 'high-performance' });
    if (!gl) throw new Error('This browser offers no WebGL 2; the cameras and counts are shown without the 3D view.');
    this.gl = gl;
    this.canvas = canvas;
    this.voxels = this.makeProgram(VOXEL_VERTEX, VOXEL_FRAGMENT);
    this.lines = this.makeProgram(LINE_VERTEX, LINE_FRAGMENT);
    this.solid = this.makeProgram(SOLID_VERTEX, SOLID_FRAGMENT);
    this.faceArray = gl.createVertexArray(); // no attributes: see makeVoxelMesh
    this.faceIndices = gl.createBuffer();
    this.indexedFaces = 0;
    this.lineBuffer = gl.createBuffer();
    this.lineArray = this.makeArray(
      this.lineBuffer,
      40,
      [
        [0, 3, 0],
        [1, 3, 12],
        [2, 4, 24],
      ],
      1,
    );
    gl.enable(gl.CULL_FACE);
  }

  makeProgram(vertex, fragment) {
    const { gl } = this;
    const program = gl.createProgram();
    for (const [type, source] of [
      [gl.VERTEX_SHADER, vertex],
      [gl.FRAGMENT_SHADER, fragment],
    ]) {
      const shader = gl.createShader(type);
      gl.shaderSource(shader, source);
      gl.compileShader(shader);
      gl.attachShader(program, shader);
    }
    gl.linkProgram(program);
    if (!gl.getProgramParameter(program, gl.LINK_STATUS)) {
      const logs = gl.getAttachedShaders(program).map((s) => gl.getShaderInfoLog(s));
      throw new Error(`A shader does not build: ${[gl.getProgramInfoLog(program), ...logs].join(' ')}`);
    }
    const uniforms = {};
    for (let i = 0; i < gl.getProgramParameter(program, gl.ACTIVE_UNIFORMS); i++) {
      const { name } = gl.getActiveUniform(program, i);
      uniforms[name] = gl.getUniformLocation(program, name);
    }
    return { program, uniforms };
  }

  /** Vertex array of float attributes [[location, numbers, offset in bytes]]. */
  makeArray(buffer, stride, attributes, divisor) {
    const { gl } = this;
    const array = gl.createVertexArray();
    gl.bindVertexArray(array);
    gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
    for (const [location, size, offset] of attributes) {
      gl.enableVertexAttribArray(location);
      gl.vertexAttribPointer(location, size, gl.FLOAT, false, stride, offset);
      gl.vertexAttribDivisor(location, divisor);
    }
    return array;
  }

  /** Faces of buildFaces on the GPU; colours come from a palette, Uint8Array RGBA [keys]. */
  makeVoxelMesh({ data, ranges, faces }, palette) {
    const { gl } = this;
    const mesh = { ranges, faces: this.makeTexture(), palette: this.makeTexture() };
    const rows = Math.max(1, Math.ceil(faces / FACES_A_ROW));
    const texels = new Uint32Array(rows * FACES_A_ROW * 2);
    texels.set(data);
    gl.bindTexture(gl.TEXTURE_2D, mesh.faces);
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.RG32UI, FACES_A_ROW, rows, 0, gl.RG_INTEGER, gl.UNSIGNED_INT, texels);
    this.reserveIndices(faces);
    this.setPalette(mesh, palette);
    return mesh;
  }

  makeTexture() {
    const { gl } = this;
    const texture = gl.createTexture();
    gl.bindTexture(gl.TEXTURE_2D, texture);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MIN_FILTER, gl.NEAREST);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MAG_FILTER, gl.NEAREST);
    return texture;
  }

  /** Make the shared list of two triangles a face long enough. */
  reserveIndices(faces) {
    if (faces <= this.indexedFaces) return;
    const { gl } = this;
    this.indexedFaces = Math.ceil(faces * 1.5);
    const indices = new Uint32Array(this.indexedFaces * 6);
    for (let face = 0; face < this.indexedFaces; face++) {
      [0, 1, 2, 2, 1, 3].forEach((corner, i) => {
        indices[face * 6 + i] = face * 4 + corner;
      });
    }
    gl.bindVertexArray(this.faceArray);
    gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, this.faceIndices);
    gl.bufferData(gl.ELEMENT_ARRAY_BUFFER, indices, gl.STATIC_DRAW);
  }

  setPalette(mesh, palette) {
    const { gl } = this;
    const rows = Math.ceil(palette.length / 1024); // 256 colours a row
    const texels = new Uint8Array(rows * 1024);
    texels.set(palette);
    gl.bindTexture(gl.TEXTURE_2D, mesh.palette);
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA8, 256, rows, 0, gl.RGBA, gl.UNSIGNED_BYTE, texels);
  }

  deleteMesh(mesh) {
    this.gl.deleteTexture(mesh.faces);
    this.gl.deleteTexture(mesh.palette);
  }

  /** Clear a pane {x, y, width, height} (pixels from the lower left) and draw there from now on. */
  beginPane(pane, background) {
    const { gl } = this;
    gl.viewport(pane.x, pane.y, pane.width, pane.height);
    gl.scissor(pane.x, pane.y, pane.width, pane.height);
    gl.enable(gl.SCISSOR_TEST);
    gl.enable(gl.DEPTH_TEST);
    gl.clearColor(background[0] / 255, background[1] / 255, background[2] / 255, background[3] ?? 1);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
  }

  /** Draw a mesh; sides that no eye at this place can see are left out. */
  drawVoxels(mesh, grid, clipFromEgo, eye, background, fogEnd) {
    const {
      gl,
      voxels: { program, uniforms },
    } = this;
    gl.useProgram(program);
    gl.uniformMatrix4fv(uniforms.clipFromEgo, false, clipFromEgo);
    gl.uniform3fv(uniforms.rangeMin, grid.rangeMin);
    gl.uniform3fv(uniforms.eye, eye);
    gl.uniform3fv(
      uniforms.background,
      background.slice(0, 3).map((c) => c / 255),
    );
    gl.uniform1f(uniforms.voxelSize, grid.voxelSize);
    gl.uniform1f(uniforms.fogEnd, fogEnd);
    gl.uniform1i(uniforms.faces, 0);
    gl.uniform1i(uniforms.palette, 1);
    gl.activeTexture(gl.TEXTURE1);
    gl.bindTexture(gl.TEXTURE_2D, mesh.palette);
    gl.activeTexture(gl.TEXTURE0);
    gl.bindTexture(gl.TEXTURE_2D, mesh.faces);
    gl.bindVertexArray(this.faceArray);
    mesh.ranges.forEach(([first, count], side) => {
      const axis = side >> 1;
      const rangeMax = grid.rangeMin[axis] + grid.shape[axis] * grid.voxelSize;
      const isBehind = side & 1 ? eye[axis] > rangeMax : eye[axis] < grid.rangeMin[axis];
      if (!count || isBehind) return;
      gl.drawElements(gl.TRIANGLES, count * 6, gl.UNSIGNED_INT, first * 24);
    });
  }

  /** Draw line segments, faintly also where something hides them (`behind`, opacity 0..1). */
  drawLines(lines, clipFromEgo, pane, width, behind = 0) {
    const {
      gl,
      lines: { program, uniforms },
    } = this;
    const count = lines.numbers.length / 10;
    if (!count) return;
    gl.useProgram(program);
    gl.bindVertexArray(this.lineArray);
    gl.bindBuffer(gl.ARRAY_BUFFER, this.lineBuffer);
    gl.bufferData(gl.ARRAY_BUFFER, new Float32Array(lines.numbers), gl.DYNAMIC_DRAW);
    gl.uniformMatrix4fv(uniforms.clipFromEgo, false, clipFromEgo);
    gl.uniform2f(uniforms.viewport, pane.width, pane.height);
    gl.uniform1f(uniforms.width, width);
    gl.disable(gl.CULL_FACE);
    gl.enable(gl.BLEND);
    gl.depthMask(false);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
    if (behind) {
      gl.disable(gl.DEPTH_TEST);
      gl.uniform1f(uniforms.opacity, behind);
      gl.drawArraysInstanced(gl.TRIANGLE_STRIP, 0, 4, count);
      gl.enable(gl.DEPTH_TEST);
    }
    gl.uniform1f(uniforms.opacity, 1);
    gl.drawArraysInstanced(gl.TRIANGLE_STRIP, 0, 4, count);
    gl.depthMask(true);
    gl.disable(gl.BLEND);
    gl.enable(gl.CULL_FACE);
  }

  drawCar(triangles, clipFromEgo) {
    const { gl } = this;
    if (!this.car) {
      const buffer = gl.createBuffer();
      gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
      gl.bufferData(gl.ARRAY_BUFFER, triangles, gl.STATIC_DRAW);
      this.car = this.makeArray(
        buffer,
        36,
        [
          [0, 3, 0],
          [1, 3, 12],
          [2, 3, 24],
        ],
        0,
      );
    }
    gl.useProgram(this.solid.program);
    gl.bindVertexArray(this.car);
    gl.uniformMatrix4fv(this.solid.uniforms.clipFromEgo, false, clipFromEgo);
    gl.drawArrays(gl.TRIANGLES, 0, triangles.length / 9);
  }

  /** ImageData of a mesh seen by a camera, transparent where there is no voxel. */
  drawToImage(mesh, grid, clipFromEgo, eye, width, height) {
    const { gl } = this;
    const target = gl.createFramebuffer();
    const [colour, depth] = [gl.createRenderbuffer(), gl.createRenderbuffer()];
    gl.bindFramebuffer(gl.FRAMEBUFFER, target);
    for (const [buffer, format, place] of [
      [colour, gl.RGBA8, gl.COLOR_ATTACHMENT0],
      [depth, gl.DEPTH_COMPONENT24, gl.DEPTH_ATTACHMENT],
    ]) {
      gl.bindRenderbuffer(gl.RENDERBUFFER, buffer);
      gl.renderbufferStorage(gl.RENDERBUFFER, format, width, height);
      gl.framebufferRenderbuffer(gl.FRAMEBUFFER, place, gl.RENDERBUFFER, buffer);
    }
    this.beginPane({ x: 0, y: 0, width, height }, [0, 0, 0, 0]);
    this.drawVoxels(mesh, grid, clipFromEgo, eye, [0, 0, 0], 1e9);
    const pixels = new Uint8ClampedArray(width * height * 4);
    gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, new Uint8Array(pixels.buffer));
    gl.bindFramebuffer(gl.FRAMEBUFFER, null);
    gl.deleteFramebuffer(target);
    gl.deleteRenderbuffer(colour);
    gl.deleteRenderbuffer(depth);
    const image = new ImageData(width, height);
    for (let row = 0; row < height; row++) {
      // WebGL's first row is the lowest
      image.data.set(pixels.subarray(row * width * 4, (row + 1) * width * 4), (height - 1 - row) * width * 4);
    }
    return image;
  }
}
