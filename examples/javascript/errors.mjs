/** A problem told in one line: where it is, what was expected, what was found, what to do next. */
export class PrefixError extends Error {
  name = 'PrefixError';
}

/** Throws a PrefixError unless `holds`. Text from files is cut, and cannot steer a terminal. */
export function expect(holds, where, expected, found, step = '') {
  if (holds) return;
  const line = `${where}: expected ${brief(expected)}; found ${brief(found)}${step && `; ${step}`}`;
  throw new PrefixError(line.replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]+/gu, ' '));
}

/** A value from a file in a few words; it may be anything. */
export function brief(value) {
  if (value !== null && typeof value === 'object') return Array.isArray(value) ? 'a list' : 'an object';
  const text = String(value ?? 'nothing');
  return text.length <= 160 ? text : `${text.slice(0, 159)}…`;
}
