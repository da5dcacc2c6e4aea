/* Every call that changes files below one folder is an event; at a chosen event the process meets its fault.
 *
 * Preloaded into a Python process (LD_PRELOAD), so that native code (tensorstore, NumPy) is met as well as Python's own.
 * It stands between a program and the C library: calls that the C library makes inside itself (the flushing of a FILE)
 * and bare system calls are not seen. tests/test_kills.py compares what it sees with strace, where that is there.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NOTHING, KILL, TORN, FAIL, FAIL_FROM, SIGNAL, SHORT };
/* What counts: changes; opening for reading as well; locks and hard links only. */
enum { CHANGES, READS, LOCKS };

static char root[PATH_MAX];
static size_t root_length;
static atomic_long seen;
static long target;
static int action, value, scope, log_fd = -1;
static atomic_int armed;

void faults_arm(const char *folder, long at, int what, int with, int counted, int log) {
    snprintf(root, sizeof root, "%s", folder);
    root_length = strlen(root);
    atomic_store(&seen, 0);
    target = at, action = what, value = with, scope = counted, log_fd = log;
    atomic_store(&armed, 1);
}

long faults_seen(void) { return atomic_load(&seen); }
void faults_disarm(void) { atomic_store(&armed, 0); }

static int below(const char *path) {
    return strncmp(path, root, root_length) == 0 && (path[root_length] == '/' || path[root_length] == 0);
}

static void die(void) {
    syscall(SYS_kill, syscall(SYS_getpid), SIGKILL);
    for (;;) pause();
}

/* 0: go on. -1: fail with errno. 1: half of it, or all, and then the end. 2: half of it. */
static int event(const char *name, const char *path, int kind) {
    if (scope == LOCKS ? kind != LOCKS : kind == LOCKS || (kind == READS && scope != READS)) return 0;
    long number = atomic_fetch_add(&seen, 1) + 1;
    if (log_fd >= 0) {
        char line[PATH_MAX + 64];
        int length = snprintf(line, sizeof line, "%ld %s %s\n", number, name, path);
        syscall(SYS_write, log_fd, line, (size_t)length);
    }
    if (number != target && !(action == FAIL_FROM && target > 0 && number > target)) return 0;
    switch (action) {
    case KILL: die(); return 0;
    case TORN: return 1;
    case FAIL: case FAIL_FROM: errno = value; return -1;
    case SIGNAL: syscall(SYS_kill, syscall(SYS_getpid), value); return 0;
    case SHORT: return 2;
    default: return 0;
    }
}

static int on_path(const char *name, int folder, const char *path, int kind) {
    if (!atomic_load(&armed) || path == NULL) return 0;
    int before = errno;
    char whole[PATH_MAX], link[64];
    if (path[0] == '/') {
        snprintf(whole, sizeof whole, "%s", path);
    } else {
        ssize_t length;
        if (folder == AT_FDCWD) {
            if (getcwd(whole, sizeof whole / 2) == NULL) return 0;
            length = (ssize_t)strlen(whole);
        } else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
            length = readlink(link, whole, sizeof whole / 2);
            if (length < 0) return errno = before, 0;
        }
        snprintf(whole + length, sizeof whole - (size_t)length, "/%s", path);
    }
    errno = before;
    return below(whole) ? event(name, whole, kind) : 0;
}

static int on_file(const char *name, int descriptor, int kind) {
    if (!atomic_load(&armed) || descriptor == log_fd) return 0;
    int before = errno;
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = before;
    if (length < 0) return 0;
    path[length] = 0;
    return below(path) ? event(name, path, kind) : 0;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define CALL(name, ...) ({ static __typeof__(&name) next; if (!next) next = NEXT(name); next(__VA_ARGS__); })
/* The call itself, between its event and, for a torn one, the end. */
#define AROUND(met, failed, call) ({ \
    int met_ = (met); \
    __typeof__(call) result_; \
    if (met_ < 0) result_ = (failed); \
    else { result_ = (call); if (met_ == 1) die(); } \
    result_; })

static int writes(int flags) { return (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC); }
static int opening(int flags) { return writes(flags) ? CHANGES : READS; }

#define MODE(flags) ({ mode_t mode_ = 0; if ((flags) & (O_CREAT | __O_TMPFILE)) { \
    va_list more; va_start(more, flags); mode_ = va_arg(more, mode_t); va_end(more); } mode_; })
int open(const char *p, int f, ...) { mode_t m = MODE(f); return AROUND(on_path("open", AT_FDCWD, p, opening(f)), -1, CALL(open, p, f, m)); }
int open64(const char *p, int f, ...) { mode_t m = MODE(f); return AROUND(on_path("open", AT_FDCWD, p, opening(f)), -1, CALL(open64, p, f, m)); }
int openat(int d, const char *p, int f, ...) { mode_t m = MODE(f); return AROUND(on_path("open", d, p, opening(f)), -1, CALL(openat, d, p, f, m)); }
int openat64(int d, const char *p, int f, ...) { mode_t m = MODE(f); return AROUND(on_path("open", d, p, opening(f)), -1, CALL(openat64, d, p, f, m)); }
int creat(const char *p, mode_t m) { return AROUND(on_path("open", AT_FDCWD, p, CHANGES), -1, CALL(creat, p, m)); }
FILE *fopen(const char *p, const char *m) { return AROUND(on_path("fopen", AT_FDCWD, p, strpbrk(m, "wa+") ? CHANGES : READS), NULL, CALL(fopen, p, m)); }
FILE *fopen64(const char *p, const char *m) { return AROUND(on_path("fopen", AT_FDCWD, p, strpbrk(m, "wa+") ? CHANGES : READS), NULL, CALL(fopen64, p, m)); }

#define HALF(met, count) ((met) > 0 ? ((count) + 1) / 2 : (count))
ssize_t write(int d, const void *b, size_t n) { int met = on_file("write", d, CHANGES); return AROUND(met, -1, CALL(write, d, b, HALF(met, n))); }
ssize_t pwrite(int d, const void *b, size_t n, off_t o) { int met = on_file("write", d, CHANGES); return AROUND(met, -1, CALL(pwrite, d, b, HALF(met, n), o)); }
ssize_t pwrite64(int d, const void *b, size_t n, off64_t o) { int met = on_file("write", d, CHANGES); return AROUND(met, -1, CALL(pwrite64, d, b, HALF(met, n), o)); }
ssize_t writev(int d, const struct iovec *v, int n) { int met = on_file("write", d, CHANGES); return AROUND(met, -1, CALL(writev, d, v, HALF(met, n))); }
ssize_t pwritev(int d, const struct iovec *v, int n, off_t o) { int met = on_file("write", d, CHANGES); return AROUND(met, -1, CALL(pwritev, d, v, HALF(met, n), o)); }
ssize_t pwritev2(int d, const struct iovec *v, int n, off_t o, int f) { int met = on_file("write", d, CHANGES); return AROUND(met, -1, CALL(pwritev2, d, v, HALF(met, n), o, f)); }
ssize_t sendfile(int, int, off_t *, size_t);
ssize_t sendfile64(int, int, off64_t *, size_t);
ssize_t sendfile(int d, int s, off_t *o, size_t n) { int met = on_file("write", d, CHANGES); return AROUND(met, -1, CALL(sendfile, d, s, o, HALF(met, n))); }
ssize_t sendfile64(int d, int s, off64_t *o, size_t n) { int met = on_file("write", d, CHANGES); return AROUND(met, -1, CALL(sendfile64, d, s, o, HALF(met, n))); }
ssize_t copy_file_range(int s, off64_t *a, int d, off64_t *b, size_t n, unsigned f) { int met = on_file("write", d, CHANGES); return AROUND(met, -1, CALL(copy_file_range, s, a, d, b, HALF(met, n), f)); }
void *mmap(void *a, size_t n, int p, int f, int d, off_t o) {
    int met = d >= 0 && (f & MAP_SHARED) && (p & PROT_WRITE) ? on_file("mmap", d, CHANGES) : 0;
    return AROUND(met, MAP_FAILED, CALL(mmap, a, n, p, f, d, o));
}

int fsync(int d) { return AROUND(on_file("fsync", d, CHANGES), -1, CALL(fsync, d)); }
int fdatasync(int d) { return AROUND(on_file("fsync", d, CHANGES), -1, CALL(fdatasync, d)); }
int ftruncate(int d, off_t n) { return AROUND(on_file("ftruncate", d, CHANGES), -1, CALL(ftruncate, d, n)); }
int ftruncate64(int d, off64_t n) { return AROUND(on_file("ftruncate", d, CHANGES), -1, CALL(ftruncate64, d, n)); }
int truncate(const char *p, off_t n) { return AROUND(on_path("ftruncate", AT_FDCWD, p, CHANGES), -1, CALL(truncate, p, n)); }
int fallocate(int d, int m, off_t o, off_t n) { return AROUND(on_file("fallocate", d, CHANGES), -1, CALL(fallocate, d, m, o, n)); }
int fallocate64(int d, int m, off64_t o, off64_t n) { return AROUND(on_file("fallocate", d, CHANGES), -1, CALL(fallocate64, d, m, o, n)); }
int posix_fallocate(int d, off_t o, off_t n) { return AROUND(on_file("fallocate", d, CHANGES), errno, CALL(posix_fallocate, d, o, n)); }
int posix_fallocate64(int d, off64_t o, off64_t n) { return AROUND(on_file("fallocate", d, CHANGES), errno, CALL(posix_fallocate64, d, o, n)); }

int rename(const char *a, const char *b) { return AROUND(on_path("rename", AT_FDCWD, b, CHANGES), -1, CALL(rename, a, b)); }
int renameat(int x, const char *a, int y, const char *b) { return AROUND(on_path("rename", y, b, CHANGES), -1, CALL(renameat, x, a, y, b)); }
int renameat2(int x, const char *a, int y, const char *b, unsigned f) { return AROUND(on_path("rename", y, b, CHANGES), -1, CALL(renameat2, x, a, y, b, f)); }
int link(const char *a, const char *b) { return AROUND(on_path("link", AT_FDCWD, b, scope == LOCKS ? LOCKS : CHANGES), -1, CALL(link, a, b)); }
int linkat(int x, const char *a, int y, const char *b, int f) { return AROUND(on_path("link", y, b, scope == LOCKS ? LOCKS : CHANGES), -1, CALL(linkat, x, a, y, b, f)); }
int symlink(const char *a, const char *b) { return AROUND(on_path("symlink", AT_FDCWD, b, scope == LOCKS ? LOCKS : CHANGES), -1, CALL(symlink, a, b)); }
int symlinkat(const char *a, int y, const char *b) { return AROUND(on_path("symlink", y, b, scope == LOCKS ? LOCKS : CHANGES), -1, CALL(symlinkat, a, y, b)); }
int mkdir(const char *p, mode_t m) { return AROUND(on_path("mkdir", AT_FDCWD, p, CHANGES), -1, CALL(mkdir, p, m)); }
int mkdirat(int d, const char *p, mode_t m) { return AROUND(on_path("mkdir", d, p, CHANGES), -1, CALL(mkdirat, d, p, m)); }
int unlink(const char *p) { return AROUND(on_path("unlink", AT_FDCWD, p, CHANGES), -1, CALL(unlink, p)); }
int unlinkat(int d, const char *p, int f) { return AROUND(on_path(f & AT_REMOVEDIR ? "rmdir" : "unlink", d, p, CHANGES), -1, CALL(unlinkat, d, p, f)); }
int rmdir(const char *p) { return AROUND(on_path("rmdir", AT_FDCWD, p, CHANGES), -1, CALL(rmdir, p)); }
int remove(const char *p) { return AROUND(on_path("unlink", AT_FDCWD, p, CHANGES), -1, CALL(remove, p)); }
int chmod(const char *p, mode_t m) { return AROUND(on_path("chmod", AT_FDCWD, p, CHANGES), -1, CALL(chmod, p, m)); }
int fchmod(int d, mode_t m) { return AROUND(on_file("chmod", d, CHANGES), -1, CALL(fchmod, d, m)); }
int fchmodat(int d, const char *p, mode_t m, int f) { return AROUND(on_path("chmod", d, p, CHANGES), -1, CALL(fchmodat, d, p, m, f)); }
int utimensat(int d, const char *p, const struct timespec t[2], int f) { return AROUND(on_path("utime", d, p, CHANGES), -1, CALL(utimensat, d, p, t, f)); }
int futimens(int d, const struct timespec t[2]) { return AROUND(on_file("utime", d, CHANGES), -1, CALL(futimens, d, t)); }

int flock(int d, int o) { return AROUND(o & LOCK_UN ? 0 : on_file("flock", d, LOCKS), -1, CALL(flock, d, o)); }
int fcntl(int d, int c, ...) {
    va_list more; va_start(more, c); long a = va_arg(more, long); va_end(more);
    int locks = c == F_SETLK || c == F_SETLKW || c == F_OFD_SETLK || c == F_OFD_SETLKW;
    return AROUND(locks ? on_file("flock", d, LOCKS) : 0, -1, CALL(fcntl, d, c, a));
}
int fcntl64(int d, int c, ...) {
    va_list more; va_start(more, c); long a = va_arg(more, long); va_end(more);
    int locks = c == F_SETLK || c == F_SETLKW || c == F_OFD_SETLK || c == F_OFD_SETLKW;
    return AROUND(locks ? on_file("flock", d, LOCKS) : 0, -1, CALL(fcntl64, d, c, a));
}
