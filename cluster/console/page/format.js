// Numbers and times as text.

const WHOLE = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
export const NONE = "\u2013";

export const whole = (value) => (value === null || value === undefined ? NONE : WHOLE.format(value));

/** Three digits that matter, as 0.123, 1.23, 12.3, 1,234. */
export function figure(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return NONE;
  const size = Math.abs(value);
  if (size >= 100 || value === 0) return WHOLE.format(value);
  return value.toFixed(size >= 10 ? 1 : 2);
}

export function bytes(value) {
  if (value === null || value === undefined) return NONE;
  for (const [unit, size] of [["TB", 1e12], ["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (value >= size) return `${figure(value / size)} ${unit}`;
  }
  return `${value} B`;
}

export const percent = (share, digits = 0) => (share === null || share === undefined ? NONE : `${(100 * share).toFixed(digits)} %`);

export const signed = (share) => (share === null || share === undefined ? NONE : `${share > 0 ? "+" : share < 0 ? "\u2212" : ""}${Math.abs(100 * share).toFixed(1)} %`);

/** Milliseconds as they are said: 0.42 ms, 41 ms, 1.23 s. */
export function duration(ms) {
  if (ms === null || ms === undefined) return [NONE, ""];
  return ms >= 1000 ? [figure(ms / 1000), "s"] : [figure(ms), "ms"];
}

const two = (value) => String(value).padStart(2, "0");

/** Local time of seconds since 1970. */
export function clock(seconds) {
  const date = new Date(1000 * seconds);
  return `${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}`;
}

export function ago(seconds) {
  if (seconds < 0.95) return "now";
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  return `${Math.round(seconds / 3600)} h`;
}

export const many = (count, noun, plural = `${noun}s`) => `${whole(count)} ${count === 1 ? noun : plural}`;

/** The end of a long id, which tells replicas of a deployment apart. */
export const short = (id) => (id.length > 12 ? `\u2026${id.slice(-8)}` : id);

/** Ranks as 1, 2, 5\u20138. */
export function ranges(numbers) {
  const parts = [];
  for (let at = 0; at < numbers.length;) {
    let end = at;
    while (end + 1 < numbers.length && numbers[end + 1] === numbers[end] + 1) end += 1;
    parts.push(end - at < 2 ? numbers.slice(at, end + 1).join(", ") : `${numbers[at]}\u2013${numbers[end]}`);
    at = end + 1;
  }
  return parts.join(", ");
}
