/** What tests/bridges/javascript_cases.py wrote. */
import { readFileSync } from 'node:fs';

export const cases = JSON.parse(readFileSync(process.env.PREFIXKIT_CASES, 'utf8'));
export const json = (path) => JSON.parse(readFileSync(path, 'utf8'));

/** The largest difference between numbers and an array of any depth. */
export function apart(numbers, expected) {
  const wanted = expected.flat(Infinity);
  if (numbers.length !== wanted.length) return Infinity;
  return wanted.reduce((most, number, index) => Math.max(most, Math.abs(number - numbers[index])), 0);
}
