//! The program's allocator: the system's, with large blocks kept when they are freed and handed out
//! again.
//!
//! A denoising step makes and drops the same few hundred tensors of 1 to 200 MB as the step before.
//! The system's allocator returns each to the kernel, which then clears and maps every page anew:
//! about a sixth of a step's time. Kept blocks need neither, and on Linux they are backed by huge
//! pages.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::{Mutex, MutexGuard, OnceLock};

/// Blocks from this size on are kept, in bytes.
const LARGE: usize = 1 << 20;
/// Idle blocks together hold at most this, in bytes.
const KEPT: usize = 768 << 20;
/// Idle blocks and those in use together hold at most the most that was ever in use, and this part
/// of it: what is kept makes the program's peak of memory hardly larger.
const SPARE: usize = 16;
/// A block that so many large requests passed by goes back to the system: its stage is over.
const STALE: u64 = 384;
/// Idle blocks at most.
const SLOTS: usize = 96;
/// Before every large block, so that blocks keep their alignment: its size.
const HEADER: usize = 64;

/// What is done where the system has no memory left.
static ON_EXHAUSTION: OnceLock<fn(usize)> = OnceLock::new();

/// Has a function called with the number of bytes whenever the system has not as many left. It must
/// not allocate, and may end the process; if it returns, the caller of the allocator fails.
pub fn on_exhaustion(act: fn(usize)) {
    ON_EXHAUSTION.set(act).ok();
}

/// Tells of a block that the system did not give.
fn told(block: *mut u8, bytes: usize) -> *mut u8 {
    if block.is_null()
        && let Some(act) = ON_EXHAUSTION.get()
    {
        act(bytes);
    }
    block
}

/// The allocator: `#[global_allocator] static MEMORY: Reuse = Reuse;`
pub struct Reuse;

#[derive(Clone, Copy)]
struct Idle {
    /// start of the header
    address: usize,
    /// bytes with the header
    size: usize,
    /// the count of requests when it was freed
    since: u64,
}

struct Pool {
    idle: [Idle; SLOTS],
    len: usize,
    /// bytes that are idle, in use, and were in use at most
    bytes: usize,
    used: usize,
    peak: usize,
    requests: u64,
}

static POOL: Mutex<Pool> = Mutex::new(Pool {
    idle: [Idle {
        address: 0,
        size: 0,
        since: 0,
    }; SLOTS],
    len: 0,
    bytes: 0,
    used: 0,
    peak: 0,
    requests: 0,
});

impl Pool {
    /// The smallest idle block that holds `size` bytes without wasting half of itself. If there is
    /// none, a new one of that size is counted as in use.
    fn take(&mut self, size: usize) -> Option<usize> {
        self.requests += 1;
        let fits = self
            .idle
            .iter()
            .take(self.len)
            .enumerate()
            .filter(|(_, b)| b.size >= size && b.size <= size + size / 2);
        let found = fits
            .min_by_key(|(_, b)| b.size)
            .map(|(at, _)| at)
            .map(|at| self.remove(at));
        self.used += found.map_or(size, |block| block.size);
        self.peak = self.peak.max(self.used);
        found.map(|block| block.address)
    }

    fn remove(&mut self, at: usize) -> Idle {
        self.idle.swap(at, self.len - 1);
        self.len -= 1;
        let block = self.idle[self.len];
        self.bytes -= block.size;
        block
    }

    /// An idle block to give back: any that is stale, or the oldest if there are too many.
    fn excess(&mut self) -> Option<Idle> {
        let (at, oldest) = self
            .idle
            .iter()
            .take(self.len)
            .enumerate()
            .min_by_key(|(_, b)| b.since)?;
        let crowded = self.bytes > KEPT
            || self.len == SLOTS
            || self.used + self.bytes > self.peak + self.peak / SPARE;
        (crowded || oldest.since + STALE < self.requests).then(|| self.remove(at))
    }

    fn keep(&mut self, address: usize, size: usize) {
        if let Some(slot) = self.idle.get_mut(self.len) {
            *slot = Idle {
                address,
                size,
                since: self.requests,
            };
            self.len += 1;
            self.bytes += size;
        }
    }
}

fn is_large(layout: &Layout) -> bool {
    layout.size() >= LARGE && layout.align() <= HEADER
}

/// What the system is asked for: whole MiB, so that sizes nearly alike share blocks.
fn block(size: usize) -> Option<Layout> {
    let size = size.checked_add(HEADER)?.checked_next_multiple_of(LARGE)?;
    Layout::from_size_align(size, HEADER).ok()
}

fn allocate(layout: Layout) -> *mut u8 {
    let Some(wanted) = block(layout.size()) else {
        return std::ptr::null_mut();
    };
    let kept = POOL
        .lock()
        .ok()
        .and_then(|mut pool| pool.take(wanted.size()));
    let start = match kept {
        Some(address) => address as *mut u8,
        None => {
            release();
            return_to_system();
            // SAFETY: the size is not zero
            let mut start = unsafe { System.alloc(wanted) };
            if start.is_null() {
                give_back_all();
                // SAFETY: as before
                start = unsafe { System.alloc(wanted) };
            }
            if start.is_null() {
                freed(wanted.size());
                return start;
            }
            huge_pages(start, wanted.size());
            // SAFETY: the header lies inside of the block and is aligned
            unsafe { start.cast::<usize>().write(wanted.size()) };
            start
        }
    };
    // SAFETY: the block is longer than its header
    unsafe { start.add(HEADER) }
}

/// Counts a block as in use no more.
fn freed(size: usize) {
    if let Ok(mut pool) = POOL.lock() {
        pool.used = pool.used.saturating_sub(size);
    }
}

/// Gives back what is idle for too long or too much.
fn release() {
    while let Some(block) = POOL.lock().ok().and_then(|mut pool| pool.excess()) {
        give_back(block);
    }
}

/// Gives back all that is idle.
fn give_back_all() {
    let any = |mut pool: MutexGuard<Pool>| (pool.len > 0).then(|| pool.remove(0));
    while let Some(block) = POOL.lock().ok().and_then(any) {
        give_back(block);
    }
}

fn give_back(block: Idle) {
    // SAFETY: it was allocated with this layout, and nobody has it any more
    unsafe {
        System.dealloc(
            block.address as *mut u8,
            Layout::from_size_align_unchecked(block.size, HEADER),
        )
    };
}

/// Lets the system's allocator take each large block from the kernel and give it back when it is
/// freed. glibc would soon keep those of up to 32 MiB on its heap, whose holes stay the program's.
fn return_to_system() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        static ONCE: std::sync::Once = std::sync::Once::new();
        // SAFETY: a setting of the allocator, which takes it at any time
        ONCE.call_once(|| unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE as libc::c_int);
        });
    }
}

#[cfg(target_os = "linux")]
fn huge_pages(start: *mut u8, size: usize) {
    let page = 4096;
    let first = (start as usize).next_multiple_of(page);
    let length = (start as usize + size).saturating_sub(first) / page * page;
    // SAFETY: advice about pages inside of our own block; a kernel that does not take it changes
    // nothing
    unsafe { libc::madvise(first as *mut libc::c_void, length, libc::MADV_HUGEPAGE) };
}

#[cfg(not(target_os = "linux"))]
fn huge_pages(_: *mut u8, _: usize) {}

// SAFETY: blocks come from the system's allocator; a kept block is handed out once, as only `take`
// under the lock removes it
unsafe impl GlobalAlloc for Reuse {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if is_large(&layout) {
            return told(allocate(layout), layout.size());
        }
        // SAFETY: the caller's promise
        told(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if is_large(&layout) {
            let start = told(allocate(layout), layout.size());
            if !start.is_null() {
                // SAFETY: the block holds that many bytes
                unsafe { start.write_bytes(0, layout.size()) };
            }
            return start;
        }
        // SAFETY: the caller's promise
        told(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn dealloc(&self, address: *mut u8, layout: Layout) {
        if !is_large(&layout) {
            // SAFETY: the caller's promise
            return unsafe { System.dealloc(address, layout) };
        }
        // SAFETY: a large block starts with its header, which holds its size
        let (start, size) = unsafe {
            let start = address.sub(HEADER);
            (start, start.cast::<usize>().read())
        };
        freed(size);
        release();
        if let Ok(mut pool) = POOL.lock()
            && pool.len < SLOTS
        {
            return pool.keep(start as usize, size);
        }
        // SAFETY: it was allocated with this layout
        unsafe { System.dealloc(start, Layout::from_size_align_unchecked(size, HEADER)) };
    }

    unsafe fn realloc(&self, address: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let Ok(new) = Layout::from_size_align(size, layout.align()) else {
            return std::ptr::null_mut();
        };
        if !is_large(&layout) && !is_large(&new) {
            // SAFETY: the caller's promise
            return told(unsafe { System.realloc(address, layout, size) }, size);
        }
        // SAFETY: both blocks hold the smaller size, and the old one is freed once
        unsafe {
            let moved = self.alloc(new);
            if !moved.is_null() {
                std::ptr::copy_nonoverlapping(address, moved, layout.size().min(size));
                self.dealloc(address, layout);
            }
            moved
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// The pool is shared by all threads of the test; sizes that nobody else uses keep it apart.
    const ODD: usize = (37 << 20) + 12345;

    #[test]
    fn a_freed_block_is_handed_out_again_and_zeroed_when_asked() {
        let layout = Layout::from_size_align(ODD, 16).unwrap();
        unsafe {
            let first = Reuse.alloc(layout);
            assert_eq!(first as usize % HEADER, 0);
            first.write_bytes(0xaa, ODD);
            Reuse.dealloc(first, layout);
            let second = Reuse.alloc_zeroed(layout);
            assert_eq!(first, second);
            assert!(
                std::slice::from_raw_parts(second, ODD)
                    .iter()
                    .all(|b| *b == 0)
            );
            Reuse.dealloc(second, layout);
        }
    }

    #[test]
    fn growing_and_shrinking_across_the_border_keeps_the_bytes() {
        unsafe {
            let small = Layout::from_size_align(LARGE / 2, 8).unwrap();
            let start = Reuse.alloc(small);
            for i in 0..LARGE / 2 {
                start.add(i).write(i as u8);
            }
            let large = Reuse.realloc(start, small, 3 * LARGE);
            let back = Reuse.realloc(large, Layout::from_size_align(3 * LARGE, 8).unwrap(), 1000);
            assert!((0..1000).all(|i| back.add(i).read() == i as u8));
            Reuse.dealloc(back, Layout::from_size_align(1000, 8).unwrap());
        }
    }

    #[test]
    fn what_is_idle_stays_within_its_limits() {
        // of other sizes than what is idle, so that new blocks are needed
        for mib in [100, 30, 45, 20, 10] {
            let layout = Layout::from_size_align(mib << 20, 64).unwrap();
            let blocks: Vec<*mut u8> = (0..1200 / mib)
                .map(|_| unsafe { Reuse.alloc(layout) })
                .collect();
            let pool = POOL.lock().unwrap();
            assert!(pool.bytes <= KEPT && pool.used + pool.bytes <= pool.peak + pool.peak / SPARE);
            drop(pool);
            blocks
                .into_iter()
                .for_each(|b| unsafe { Reuse.dealloc(b, layout) });
        }
    }
}
