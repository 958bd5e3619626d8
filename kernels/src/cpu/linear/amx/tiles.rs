//! The six tile instructions that a bf16 product needs: on the hardware, and as a model of it.
//!
//! The model follows the pseudo-code of Intel's Software Developer's Manual, volume 2, for `LDTILECFG`, `TILELOADD`, `TDPBF16PS` and `TILESTORED`.
//! Everything above these instructions is tested on the model; the instructions themselves are tried against it at start, by
//! [`super::works`], before they are used.

/// Shapes of the eight tiles: the memory operand of `LDTILECFG`, palette 1.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C, align(64))]
pub(super) struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    /// Bytes per row, at most 64.
    bytes: [u16; 16],
    /// At most 16.
    rows: [u8; 16],
}

impl Config {
    /// Sixteen rows of these bytes in each of the tiles 0 to 7.
    pub(super) fn new(bytes: [usize; 8]) -> Config {
        let mut config =
            Config { palette: 1, start_row: 0, reserved: [0; 14], bytes: [0; 16], rows: [0; 16] };
        for (i, b) in bytes.into_iter().enumerate() {
            config.bytes[i] = b as u16;
            config.rows[i] = if b == 0 { 0 } else { 16 };
        }
        config
    }
}

/// Eight tiles of up to 16 rows of 64 bytes.
///
/// # Safety
/// A tile was configured before it is used. Pointers are valid for the rows and bytes of their tile, `stride` bytes apart.
pub(super) trait Tiles {
    /// Sets the shapes, and all tiles to zero.
    unsafe fn configure(&mut self, config: &Config);
    unsafe fn zero<const T: usize>(&mut self);
    unsafe fn load<const T: usize>(&mut self, p: *const u8, stride: usize);
    /// `C[m][n] += Σ_k A[m][k] * B[k][n]`, the elements of A and B being pairs of bf16, those of C f32.
    unsafe fn dot<const C: usize, const A: usize, const B: usize>(&mut self);
    unsafe fn store<const T: usize>(&mut self, p: *mut f32, stride: usize);
    /// Gives the tiles back; they must be configured again.
    unsafe fn release(&mut self);
}

/// The tiles of this core. The proof that it has them, and that the system lets this process use them.
#[derive(Clone, Copy)]
pub(super) struct Hardware(());

impl Hardware {
    /// # Safety
    /// The CPU has AMX-TILE and AMX-BF16, and the kernel gave this process the tile state.
    pub(super) unsafe fn new() -> Self {
        Hardware(())
    }
}

/// One tile instruction.
macro_rules! tile {
    ($($args:tt)*) => {
        // SAFETY: `self` exists, so the CPU has the instruction; shapes and pointers are right by the caller's word. No compiled code
        // uses tiles, so their contents last from one statement to the next.
        unsafe { std::arch::asm!($($args)*, options(nostack, preserves_flags)) }
    };
}

impl Tiles for Hardware {
    #[inline(always)]
    unsafe fn configure(&mut self, config: &Config) {
        tile!("ldtilecfg [{c}]", c = in(reg) config);
    }
    #[inline(always)]
    unsafe fn zero<const T: usize>(&mut self) {
        tile!("tilezero tmm{t}", t = const T);
    }
    #[inline(always)]
    unsafe fn load<const T: usize>(&mut self, p: *const u8, stride: usize) {
        tile!("tileloadd tmm{t}, [{p} + {s}*1]", t = const T, p = in(reg) p, s = in(reg) stride);
    }
    #[inline(always)]
    unsafe fn dot<const C: usize, const A: usize, const B: usize>(&mut self) {
        tile!("tdpbf16ps tmm{c}, tmm{a}, tmm{b}", c = const C, a = const A, b = const B);
    }
    #[inline(always)]
    unsafe fn store<const T: usize>(&mut self, p: *mut f32, stride: usize) {
        tile!("tilestored [{p} + {s}*1], tmm{t}", t = const T, p = in(reg) p, s = in(reg) stride);
    }
    #[inline(always)]
    unsafe fn release(&mut self) {
        tile!("tilerelease");
    }
}

/// Tiles in plain memory.
pub(super) struct Model {
    config: Option<Config>,
    tiles: [[[u8; 64]; 16]; 8],
}

impl Model {
    pub(super) fn new() -> Self {
        Model { config: None, tiles: [[[0; 64]; 16]; 8] }
    }

    /// Rows of tile `t`, and bytes of each. Panics where the hardware would raise an exception.
    fn shape(&self, t: usize) -> (usize, usize) {
        let Some(config) = &self.config else { panic!("tile {t} is used and not configured") };
        assert!(config.rows[t] > 0 && config.bytes[t] > 0, "tile {t} is used and has no shape");
        (config.rows[t].into(), config.bytes[t].into())
    }

    fn word(&self, t: usize, row: usize, i: usize) -> u32 {
        let b = &self.tiles[t][row][4 * i..];
        u32::from_le_bytes([b[0], b[1], b[2], b[3]])
    }
}

/// The two bf16 of a pair, lower half first, with denormals as zero.
fn pair(word: u32) -> [f32; 2] {
    [flush(f32::from_bits(word << 16)), flush(f32::from_bits(word & 0xffff_0000))]
}

fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0.0_f32.copysign(x) } else { x }
}

impl Tiles for Model {
    unsafe fn configure(&mut self, config: &Config) {
        assert!(config.palette == 1 && config.start_row == 0 && config.reserved == [0; 14]);
        assert!(config.rows.iter().all(|&r| r <= 16) && config.bytes.iter().all(|&b| b <= 64));
        *self = Model { config: Some(*config), ..Model::new() };
    }

    unsafe fn zero<const T: usize>(&mut self) {
        self.shape(T);
        self.tiles[T] = [[0; 64]; 16];
    }

    unsafe fn load<const T: usize>(&mut self, p: *const u8, stride: usize) {
        let (rows, bytes) = self.shape(T);
        self.tiles[T] = [[0; 64]; 16];
        for row in 0..rows {
            // SAFETY: the caller's pointer is valid for this row.
            unsafe {
                std::ptr::copy_nonoverlapping(p.add(row * stride), self.tiles[T][row].as_mut_ptr(), bytes)
            };
        }
    }

    unsafe fn dot<const C: usize, const A: usize, const B: usize>(&mut self) {
        let ((rows, bytes), (a_rows, a_bytes), (b_rows, b_bytes)) =
            (self.shape(C), self.shape(A), self.shape(B));
        assert!(C != A && C != B && A != B, "tiles must differ");
        assert!(a_rows == rows && b_bytes == bytes && b_rows == a_bytes / 4, "shapes do not fit");
        for m in 0..rows {
            for n in 0..bytes / 4 {
                let mut sums = [0.0_f32; 2];
                for k in 0..a_bytes / 4 {
                    let (a, b) = (pair(self.word(A, m, k)), pair(self.word(B, k, n)));
                    for i in 0..2 {
                        sums[i] = flush(a[i].mul_add(b[i], sums[i]));
                    }
                }
                let old = flush(f32::from_bits(self.word(C, m, n)));
                let new = flush(old + flush(sums[0] + sums[1]));
                self.tiles[C][m][4 * n..4 * n + 4].copy_from_slice(&new.to_le_bytes());
            }
        }
    }

    unsafe fn store<const T: usize>(&mut self, p: *mut f32, stride: usize) {
        let (rows, bytes) = self.shape(T);
        for row in 0..rows {
            // SAFETY: the caller's pointer is valid for this row.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    self.tiles[T][row].as_ptr(),
                    p.cast::<u8>().add(row * stride),
                    bytes,
                )
            };
        }
    }

    unsafe fn release(&mut self) {
        self.config = None;
    }
}
