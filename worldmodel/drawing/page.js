"use strict";
// A small point viewer. Every cloud is a bundle of rays: a direction (octahedral, two u16) and, per method, a range (u16), so that one
// vertex shader places the truth, the forecast and every baseline, and knows how far each is from the truth.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const one = (id) => document.getElementById(id);
  const canvas = one("view"), slider = one("time"), play = one("play");
  const gl = canvas.getContext("webgl2", { antialias: true, alpha: false });
  if (!gl) {
    one("message").hidden = false;
    document.body.dataset.ready = "no-webgl2";
    return;
  }
  const text = atob(data.blob), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);

  // ---- shaders
  const program = (vertex, fragment) => {
    const made = gl.createProgram();
    for (const [kind, source] of [[gl.VERTEX_SHADER, vertex], [gl.FRAGMENT_SHADER, fragment]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, "#version 300 es\nprecision highp float;\n" + source);
      gl.compileShader(shader);
      if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS)) throw new Error(gl.getShaderInfoLog(shader));
      gl.attachShader(made, shader);
    }
    ["a_direction", "a_range", "a_truth", "a_width", "a_intensity", "a_colour"].forEach((name, at) => gl.bindAttribLocation(made, at, name));
    gl.linkProgram(made);
    const at = {};
    for (let i = 0; i < gl.getProgramParameter(made, gl.ACTIVE_UNIFORMS); i++) {
      const name = gl.getActiveUniform(made, i).name;
      at[name] = gl.getUniformLocation(made, name);
    }
    return { made, at };
  };
  const points = program(`
    in vec2 a_direction; in float a_range, a_truth, a_width, a_intensity; in vec4 a_colour;
    uniform mat4 u_clip, u_pose; uniform sampler2D u_ramps; uniform int u_mode;
    uniform float u_metres, u_ground, u_size, u_opacity, u_faded, u_sectors, u_certain; uniform vec2 u_height, u_error;
    out vec4 v_colour;
    vec3 ramp(float row, float share) { return texture(u_ramps, vec2(clamp(share, 0.0, 1.0) * 255.0 / 256.0 + 0.5 / 256.0, (row + 0.5) / 4.0)).rgb; }
    void main() {
      vec2 f = a_direction * 2.0 - 1.0;
      vec3 d = vec3(f, 1.0 - abs(f.x) - abs(f.y));
      float t = max(-d.z, 0.0);
      d.xy += vec2(d.x >= 0.0 ? -t : t, d.y >= 0.0 ? -t : t);
      vec4 place = u_pose * vec4(normalize(d) * a_range * u_metres, 1.0);
      gl_Position = u_clip * place;
      gl_PointSize = clamp(u_size / gl_Position.w, 1.3, 24.0);
      if (a_range >= 1.0) gl_Position = vec4(2.0, 2.0, 2.0, 1.0);
      float over = (place.z - u_ground - u_height.x) / (u_height.y - u_height.x);
      vec3 colour = ramp(0.0, over);
      float opacity = u_opacity;
      if (u_mode == 0 && a_truth < 1.0) {
        float error = abs(a_range - a_truth) * u_metres;
        float share = clamp((error - u_error.x) / u_error.x, 0.0, 1.0);
        colour = mix(colour, ramp(1.0, (error - u_error.x) / (u_error.y - u_error.x)), share);
      }
      if (u_mode == 2) colour = ramp(2.0, sqrt(a_intensity));
      if (u_mode == 3) colour = a_colour.rgb;
      if (u_mode == 4) {
        if (u_sectors > 0.5 && a_colour.a < 0.5) colour = mix(colour, vec3(0.3, 0.36, 0.46), 0.75) * 0.75;
        if (u_certain > 0.5 && (u_sectors < 0.5 || a_colour.a > 0.5)) opacity *= max(exp(-a_width * 12.75 / ${data.certainty.toFixed(2)}), 0.05);
      }
      colour = mix(colour, vec3(0.38, 0.44, 0.55), u_faded);
      v_colour = vec4(colour, opacity);
    }`, `
    in vec4 v_colour; out vec4 colour;
    void main() {
      float r = length(gl_PointCoord - 0.5);
      if (r > 0.5) discard;
      colour = v_colour;
    }`);
  const lines = program("in vec3 a_direction; uniform mat4 u_clip; void main() { gl_Position = u_clip * vec4(a_direction, 1.0); }",
    "uniform vec4 u_colour; out vec4 colour; void main() { colour = u_colour; }");

  const ramps = gl.createTexture();
  gl.bindTexture(gl.TEXTURE_2D, ramps);
  gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, 256, 4, 0, gl.RGBA, gl.UNSIGNED_BYTE, bytes.subarray(data.ramps, data.ramps + 4096));
  for (const what of [gl.TEXTURE_WRAP_S, gl.TEXTURE_WRAP_T]) gl.texParameteri(gl.TEXTURE_2D, what, gl.CLAMP_TO_EDGE);
  for (const what of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER]) gl.texParameteri(gl.TEXTURE_2D, what, gl.NEAREST);

  // ---- clouds: one buffer for everything, one vertex array per frame and method
  const buffer = gl.createBuffer();
  gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
  gl.bufferData(gl.ARRAY_BUFFER, bytes, gl.STATIC_DRAW);
  const bind = (frame, range) => {
    const array = gl.createVertexArray();
    gl.bindVertexArray(array);
    gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
    const put = (at, offset, size, kind) => {
      if (offset === null || offset === undefined) return;
      gl.enableVertexAttribArray(at);
      gl.vertexAttribPointer(at, size, kind, true, 0, offset);
    };
    put(0, frame.direction, 2, gl.UNSIGNED_SHORT);
    put(1, range, 1, gl.UNSIGNED_SHORT);
    put(2, frame.truth, 1, gl.UNSIGNED_SHORT);
    put(3, frame.width, 1, gl.UNSIGNED_BYTE);
    put(4, frame.intensity, 1, gl.UNSIGNED_BYTE);
    put(5, frame.colour, 4, gl.UNSIGNED_BYTE);
    return array;
  };
  for (const frame of data.frames) {
    frame.arrays = frame.future ? [frame.truth, frame.model, ...frame.baselines].map((range) => bind(frame, range)) : [bind(frame, frame.range)];
  }
  const path = (flat) => {
    const array = gl.createVertexArray(), held = gl.createBuffer();
    gl.bindVertexArray(array);
    gl.bindBuffer(gl.ARRAY_BUFFER, held);
    gl.bufferData(gl.ARRAY_BUFFER, new Float32Array(flat), gl.STATIC_DRAW);
    gl.enableVertexAttribArray(0);
    gl.vertexAttribPointer(0, 3, gl.FLOAT, false, 0, 0);
    return { array, count: flat.length / 3 };
  };
  const circles = [10, 20, 30, 40, 50].map((radius) => {
    const flat = [];
    for (let i = 0; i <= 128; i++) flat.push(radius * Math.cos(i * Math.PI / 64), radius * Math.sin(i * Math.PI / 64), data.ground);
    return path(flat);
  });
  const place = (pose, x, y) => [pose[0] * x + pose[1] * y + pose[3], pose[4] * x + pose[5] * y + pose[7], data.ground + 0.1];
  for (const frame of data.frames) frame.ego = path(data.outline.flatMap(([x, y]) => place(frame.pose, x, y)));

  // ---- what is shown
  const home = () => ({ target: [7, 0, data.ground], distance: 46, azimuth: 0, elevation: 0.66 });
  const state = { at: 0, mode: 0, panels: "all", baseline: data.best, eye: home(), trace: !data.sectors, size: 1, playing: false, since: 0 };
  if (data.frames.length) state.at = data.frames.findIndex((frame) => frame.future) > 0 ? data.frames.findIndex((frame) => frame.future) - 1 : 0;

  const multiply = (a, b) => {
    const out = new Float32Array(16);
    for (let c = 0; c < 4; c++) for (let r = 0; r < 4; r++) for (let k = 0; k < 4; k++) out[4 * c + r] += a[4 * k + r] * b[4 * c + k];
    return out;
  };
  const axes = (eye) => {
    const [ca, sa, ce, se] = [Math.cos(eye.azimuth), Math.sin(eye.azimuth), Math.cos(eye.elevation), Math.sin(eye.elevation)];
    return { right: [sa, -ca, 0], up: [se * ca, se * sa, ce], back: [-ce * ca, -ce * sa, se] };
  };
  const field = 40 * Math.PI / 180;
  const clip = (eye, aspect) => {
    const { right, up, back } = axes(eye);
    const from = eye.target.map((t, i) => t + eye.distance * back[i]);
    const dot = (v) => -(v[0] * from[0] + v[1] * from[1] + v[2] * from[2]);
    const look = [right[0], up[0], back[0], 0, right[1], up[1], back[1], 0, right[2], up[2], back[2], 0, dot(right), dot(up), dot(back), 1];
    // a tall panel keeps the same width of street in view
    const f = 1 / Math.tan(field / 2) * Math.min(1, Math.max(aspect / 0.75, 0.4)), near = 0.3, far = 600;
    return { matrix: multiply([f / aspect, 0, 0, 0, 0, f, 0, 0, 0, 0, (far + near) / (near - far), -1, 0, 0, 2 * far * near / (near - far), 0], look), f };
  };

  const columns = () => {
    const frame = data.frames[state.at];
    if (!frame || !frame.future) return ["seen"];
    if (state.panels === "all") return ["truth", "model", ...(data.methods > 2 ? ["baseline"] : [])];
    return [state.panels];
  };
  const drawCloud = (frame, which, settings) => {
    const u = points.at;
    gl.bindVertexArray(frame.arrays[which]);
    gl.vertexAttrib4f(5, 0.5, 0.5, 0.5, 0);
    gl.vertexAttrib1f(2, 1);
    gl.vertexAttrib1f(3, 0);
    gl.uniformMatrix4fv(u.u_pose, true, frame.future ? frame.pose : [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1]);
    gl.uniform1f(u.u_metres, frame.metres);
    gl.uniform1f(u.u_opacity, settings.opacity);
    gl.uniform1f(u.u_faded, settings.faded);
    gl.uniform1f(u.u_sectors, frame.future && data.sectors ? 1 : 0);
    gl.uniform1f(u.u_certain, settings.certain ? 1 : 0);
    gl.uniform1i(u.u_mode, frame.future ? state.mode : 1);
    const blended = settings.opacity < 1 || settings.certain;
    gl.depthMask(!blended);
    gl.drawArrays(gl.POINTS, 0, frame.count);
    gl.depthMask(true);
  };
  const draw = () => {
    const ratio = Math.min(window.devicePixelRatio || 1, 2);
    const width = Math.max(1, Math.round(canvas.clientWidth * ratio)), height = Math.max(1, Math.round(canvas.clientHeight * ratio));
    if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
    gl.disable(gl.SCISSOR_TEST);
    gl.viewport(0, 0, width, height);
    gl.clearColor(...data.background, 1);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    gl.enable(gl.DEPTH_TEST);
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.SRC_ALPHA, gl.ONE_MINUS_SRC_ALPHA);
    gl.enable(gl.SCISSOR_TEST);
    const shown = columns(), frame = data.frames[state.at], stacked = canvas.clientWidth < 600;
    const each = (stacked ? height : width) / shown.length;
    shown.forEach((panel, place) => {
      const start = Math.round(place * each) + (place ? 2 : 0), length = Math.round((place + 1) * each) - start;
      const [left, bottom, wide, tall] = stacked ? [0, height - start - length, width, length] : [start, 0, length, height];
      gl.viewport(left, bottom, wide, tall);
      gl.scissor(left, bottom, wide, tall);
      const { matrix, f } = clip(state.eye, wide / tall);
      gl.useProgram(lines.made);
      gl.uniformMatrix4fv(lines.at.u_clip, false, matrix);
      gl.uniform4f(lines.at.u_colour, 0.13, 0.16, 0.23, 1);
      for (const { array, count } of circles) { gl.bindVertexArray(array); gl.drawArrays(gl.LINE_STRIP, 0, count); }
      if (!frame) return;
      gl.uniform4f(lines.at.u_colour, 1, 0.69, 0.23, 1);
      gl.bindVertexArray(frame.ego.array);
      gl.drawArrays(gl.LINE_STRIP, 0, frame.ego.count);
      gl.useProgram(points.made);
      gl.uniformMatrix4fv(points.at.u_clip, false, matrix);
      gl.uniform1f(points.at.u_ground, data.ground);
      gl.uniform1f(points.at.u_size, 0.16 * state.size * f * tall / 2);
      gl.uniform2f(points.at.u_height, ...data.heightSpan);
      gl.uniform2f(points.at.u_error, ...data.errorSpan);
      if (frame.future) {
        const which = { truth: 0, model: 1, baseline: 2 + state.baseline }[panel];
        drawCloud(frame, which, { opacity: 1, faded: 0, certain: state.mode === 4 && panel === "model" });
      } else drawCloud(frame, 0, { opacity: 1, faded: 0.4 });
      if (state.trace) {
        const before = data.frames.filter((other, i) => !other.future && i < state.at);
        for (const other of frame.future ? before.slice(-1) : before) drawCloud(other, 0, { opacity: frame.future ? 0.16 : 0.1, faded: 0.8 });
      }
    });
    label(shown, frame, stacked);
    document.body.dataset.ready = "1";
  };
  let waiting = false;
  const again = () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; draw(); });
  };

  // ---- controls
  const label = (shown, frame, stacked) => {
    for (const name of ["seen", "truth", "model", "baseline"]) {
      const box = one("label-" + name), place = shown.indexOf(name), share = 100 * place / shown.length + "%";
      box.hidden = place < 0;
      box.style.left = stacked ? "0" : share;
      box.style.top = stacked ? share : "0";
      if (place < 0 || !frame || !frame.future) continue;
      if (name === "baseline") box.querySelector("b").textContent = one("baseline").options[state.baseline].textContent;
      const error = frame.medians[{ truth: 0, model: 1, baseline: 2 + state.baseline }[name]];
      if (name !== "truth") box.querySelector("span").textContent = error === null ? "no truth or no answer" : `median error ${(100 * error).toFixed(0)} cm`;
    }
    slider.value = state.at;
    one("now").textContent = frame ? (Math.abs(frame.time) < 0.05 ? "now" : `${frame.time > 0 ? "+" : "−"}${Math.abs(frame.time).toFixed(1)} s`) + (frame.future ? "  forecast" : "  observed") : "";
  };
  const go = (at) => { state.at = Math.max(0, Math.min(data.frames.length - 1, at)); again(); };
  const run = (on) => {
    state.playing = on;
    play.textContent = on ? "Pause" : "Play";
    state.since = performance.now();
    if (on) requestAnimationFrame(tick);
  };
  const tick = (now) => {
    if (!state.playing) return;
    const frame = data.frames[state.at], last = state.at === data.frames.length - 1;
    if (now - state.since > (last ? 1500 : frame.future ? 520 : 260)) {
      state.since = now;
      go(last ? 0 : state.at + 1);
    }
    requestAnimationFrame(tick);
  };
  play.addEventListener("click", () => run(!state.playing));
  slider.addEventListener("input", () => { run(false); go(Number(slider.value)); });
  for (const [name, set] of [["panels", (v) => { state.panels = v; }], ["mode", (v) => { state.mode = Number(v); }]]) {
    const buttons = [...one(name).querySelectorAll("button")];
    for (const button of buttons) {
      button.addEventListener("click", () => {
        set(button.value);
        for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
        for (const part of document.querySelectorAll("[data-mode]")) part.hidden = !part.dataset.mode.includes(String(state.mode));
        again();
      });
    }
  }
  one("baseline").addEventListener("change", (event) => { state.baseline = event.target.selectedIndex; again(); });
  one("trace").addEventListener("change", (event) => { state.trace = event.target.checked; again(); });
  one("size").addEventListener("input", (event) => { state.size = Number(event.target.value); again(); });
  one("home").addEventListener("click", () => { state.eye = home(); again(); });
  document.addEventListener("keydown", (event) => {
    if (event.target.matches("input, select, button") || event.ctrlKey || event.metaKey || event.altKey) return;
    const does = { " ": () => run(!state.playing), ArrowLeft: () => { run(false); go(state.at - 1); }, ArrowRight: () => { run(false); go(state.at + 1); } }[event.key];
    if (does) { event.preventDefault(); does(); }
  });

  // one finger or the left button turns; two fingers, shift or another button move; wheel and pinch zoom
  const held = new Map();
  const turn = (dx, dy) => {
    state.eye.azimuth -= dx * 0.006;
    state.eye.elevation = Math.max(0.03, Math.min(1.55, state.eye.elevation + dy * 0.006));
  };
  const move = (dx, dy) => {
    const { right } = axes(state.eye), [c, s] = [Math.cos(state.eye.azimuth), Math.sin(state.eye.azimuth)];
    const k = state.eye.distance * 2 * Math.tan(field / 2) / canvas.clientHeight;
    state.eye.target[0] += k * (-dx * right[0] + dy * c);
    state.eye.target[1] += k * (-dx * right[1] + dy * s);
  };
  const zoom = (factor) => { state.eye.distance = Math.max(2, Math.min(250, state.eye.distance * factor)); };
  canvas.addEventListener("pointerdown", (event) => { canvas.setPointerCapture(event.pointerId); held.set(event.pointerId, [event.clientX, event.clientY]); });
  for (const kind of ["pointerup", "pointercancel"]) canvas.addEventListener(kind, (event) => held.delete(event.pointerId));
  canvas.addEventListener("pointermove", (event) => {
    const before = held.get(event.pointerId);
    if (!before) return;
    const [dx, dy] = [event.clientX - before[0], event.clientY - before[1]];
    if (held.size === 2) {
      const other = [...held].find(([id]) => id !== event.pointerId)[1];
      const span = (x, y) => Math.max(8, Math.hypot(x - other[0], y - other[1]));
      zoom(span(...before) / span(event.clientX, event.clientY));
      move(dx / 2, dy / 2);
    } else if (event.buttons & 6 || event.shiftKey) move(dx, dy);
    else turn(dx, dy);
    held.set(event.pointerId, [event.clientX, event.clientY]);
    again();
  });
  canvas.addEventListener("wheel", (event) => { event.preventDefault(); zoom(Math.exp(Math.max(-60, Math.min(60, event.deltaY)) * 0.004)); again(); }, { passive: false });
  canvas.addEventListener("dblclick", () => { state.eye = home(); again(); });
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  new ResizeObserver(again).observe(canvas);
  one("trace").checked = state.trace;
  // page.html#at=9&mode=4&panels=model opens in that state
  const wanted = new URLSearchParams(location.hash.slice(1));
  for (const name of ["panels", "mode"]) {
    for (const button of one(name).querySelectorAll("button")) if (button.value === wanted.get(name)) button.click();
  }
  if (/^\d{1,4}$/.test(wanted.get("at") ?? "")) state.at = Math.min(data.frames.length - 1, Number(wanted.get("at")));
  draw();
})();
