/** One hint about a prompt while it is typed. */

import schema from "./schema.js";

const { minLength, maxLength } = schema.properties.prompt;
/** What the demo model draws. */
export const DEMO_SHAPES = [
  "ball", "square", "triangle", "star", "heart", "ring", "cross", "diamond", "moon", "fish", "boat", "sun", "house", "tree",
];
const CONTRADICTIONS = [
  [/\b(fast|quick)(-paced)?\b/i, /\bslow([- ]motion)?\b/i],
  [/\bloud\b/i, /\bquiet\b/i],
  [/\b(colou?rful)\b/i, /\bblack[- ]and[- ]white\b/i],
  [/\bday(light|time)\b/i, /\b(at night|night[- ]?time)\b/i],
];
const STYLE = /style|cinematic|realistic|anim|minimal|design|light|lit\b|camera|close-up|aerial|shot|view|paint|draw|watercolou?r|3d|colou?r|depth of field|mood|film/i;
const FEW_WORDS = 6;

/** The most useful hint, or "". Hints about words are for languages in Latin letters. */
export function hintFor(prompt, isDemo) {
  const length = [...prompt].length; // code points, as the server counts
  if (length === 0) return "";
  if (length < minLength) return `${minLength - length} characters to go.`;
  if (length > maxLength) return `${length - maxLength} characters too long.`;
  if (/[^\u0000-\u024f\u2000-\u206f]/.test(prompt)) return "";
  if (isDemo) return demoHint(prompt);
  const clash = contradiction(prompt);
  if (clash) return `“${clash[0]}” and “${clash[1]}” contradict each other.`;
  if (prompt.split(/\s+/).length < FEW_WORDS) return "Say who or what is seen, what it does, and where.";
  return STYLE.test(prompt) ? "" : "Name a style, too: “cinematic light”, “minimalist design”, “close-up”.";
}

function demoHint(prompt) {
  const words = prompt.toLowerCase();
  return DEMO_SHAPES.some((shape) => words.includes(shape)) ? "" : `The demo model draws one of these: ${DEMO_SHAPES.join(", ")}.`;
}

function contradiction(prompt) {
  for (const pair of CONTRADICTIONS) {
    const found = pair.map((pattern) => prompt.match(pattern)?.[0]);
    if (found.every(Boolean)) return found;
  }
  return null;
}
