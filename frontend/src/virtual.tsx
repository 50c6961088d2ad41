import { elementScroll, observeElementOffset, observeElementRect, Virtualizer, type VirtualItem } from "@tanstack/virtual-core";
import { useEffect, useMemo, useReducer, useRef } from "preact/hooks";

/** The rows of a long list that are in sight, as the list is scrolled. */
export function useVirtual(count: number, rowHeight: number): {
  scroller: { current: HTMLDivElement | null };
  items: VirtualItem[];
  height: number;
  scrollTo: (row: number) => void;
} {
  const scroller = useRef<HTMLDivElement>(null);
  const [, redraw] = useReducer((n: number) => n + 1, 0);
  const virtual = useMemo(
    () => new Virtualizer<HTMLDivElement, Element>({ ...options(count, rowHeight), getScrollElement: () => scroller.current, onChange: () => redraw(undefined) }),
    [],
  );
  virtual.setOptions({ ...options(count, rowHeight), getScrollElement: () => scroller.current, onChange: () => redraw(undefined) });
  useEffect(() => {
    const stop = virtual._didMount();
    return stop;
  }, [virtual]);
  useEffect(() => virtual._willUpdate());
  useEffect(() => virtual.measure(), [rowHeight]);
  return {
    scroller,
    items: virtual.getVirtualItems(),
    height: virtual.getTotalSize(),
    scrollTo: (row) => virtual.scrollToIndex(row),
  };
}

function options(count: number, rowHeight: number) {
  return { count, estimateSize: () => rowHeight, overscan: 8, scrollToFn: elementScroll, observeElementRect, observeElementOffset };
}
