/* Counts the calls of this process that change a folder, and ends it by SIGKILL at one of them.

   Loaded before libc (LD_PRELOAD); placed_arm begins the counting. Each call is a line of the log,
   "NAME PATH", the path below the folder, before it is made. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum moment { GO_ON, BEFORE, HALF, AFTER };

static char folder[PATH_MAX];
static size_t length; /* 0: not armed */
static long place;
static enum moment moment;
static int record;
static atomic_long calls;

void placed_arm(const char *path, long number, int when, const char *log) {
    snprintf(folder, sizeof folder, "%s", path);
    record = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    place = number;
    moment = when;
    length = strlen(folder);
}

static void end(void) {
    kill(getpid(), SIGKILL);
    for (;;)
        pause();
}

/* path: absolute, or seen from the open file `from`; NULL: `from` itself. */
static const char *below(int from, const char *path, char *full) {
    if (path && path[0] == '/') {
        snprintf(full, PATH_MAX, "%s", path);
    } else {
        char link[64];
        snprintf(link, sizeof link, from == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", from);
        ssize_t size = readlink(link, full, PATH_MAX - 1);
        if (size < 0)
            return NULL;
        snprintf(full + size, PATH_MAX - size, "%s%s", path ? "/" : "", path ? path : "");
    }
    int inside = !strncmp(full, folder, length) && (full[length] == '/' || !full[length]);
    return inside ? full + length : NULL;
}

static enum moment reach(const char *name, int from, const char *path) {
    char full[PATH_MAX], line[PATH_MAX + 32];
    const char *found = length ? below(from, path, full) : NULL;
    if (!found)
        return GO_ON;
    long number = atomic_fetch_add(&calls, 1) + 1;
    int size = snprintf(line, sizeof line, "%s %s\n", name, found);
    syscall(SYS_write, record, line, size);
    if (number != place)
        return GO_ON;
    if (moment == BEFORE)
        end();
    return moment;
}

#define CALL(name, from, path, ...)                                                                \
    int before = errno;                                                                            \
    enum moment now = reach(name, from, path);                                                     \
    errno = before;                                                                                \
    long done = syscall(__VA_ARGS__);                                                              \
    if (now != GO_ON)                                                                              \
        end();                                                                                     \
    return done

static int opened(int from, const char *path, int flags, mode_t mode) {
    if (!(flags & (O_CREAT | O_TRUNC)))
        return syscall(SYS_openat, from, path, flags, mode);
    CALL("open", from, path, SYS_openat, from, path, flags, mode);
}

#define OPEN(name, parameters, from)                                                               \
    int name parameters {                                                                          \
        va_list rest;                                                                              \
        va_start(rest, flags);                                                                     \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0;                  \
        va_end(rest);                                                                              \
        return opened(from, path, flags, mode);                                                    \
    }
OPEN(open, (const char *path, int flags, ...), AT_FDCWD)
OPEN(open64, (const char *path, int flags, ...), AT_FDCWD)
OPEN(openat, (int from, const char *path, int flags, ...), from)
OPEN(openat64, (int from, const char *path, int flags, ...), from)

/* A write that is torn: half of its bytes. */
#define PART(size) (now == HALF ? (size) / 2 : (size))

ssize_t write(int file, const void *data, size_t size) {
    CALL("write", file, NULL, SYS_write, file, data, PART(size));
}
ssize_t pwrite(int file, const void *data, size_t size, off_t at) {
    CALL("pwrite", file, NULL, SYS_pwrite64, file, data, PART(size), at);
}
ssize_t pwrite64(int file, const void *data, size_t size, off64_t at) {
    CALL("pwrite", file, NULL, SYS_pwrite64, file, data, PART(size), at);
}
ssize_t writev(int file, const struct iovec *parts, int count) {
    CALL("writev", file, NULL, SYS_writev, file, parts, PART(count));
}
ssize_t sendfile(int file, int from, off_t *at, size_t size) {
    CALL("sendfile", file, NULL, SYS_sendfile, file, from, at, PART(size));
}
ssize_t sendfile64(int file, int from, off64_t *at, size_t size) {
    CALL("sendfile", file, NULL, SYS_sendfile, file, from, at, PART(size));
}
ssize_t copy_file_range(int from, off64_t *a, int file, off64_t *b, size_t size, unsigned flags) {
    CALL("copy", file, NULL, SYS_copy_file_range, from, a, file, b, PART(size), flags);
}
int ftruncate(int file, off_t size) { CALL("truncate", file, NULL, SYS_ftruncate, file, size); }
int ftruncate64(int file, off64_t size) { CALL("truncate", file, NULL, SYS_ftruncate, file, size); }
int fsync(int file) { CALL("fsync", file, NULL, SYS_fsync, file); }
int fdatasync(int file) { CALL("fsync", file, NULL, SYS_fdatasync, file); }

int renameat2(int from, const char *old, int to, const char *new, unsigned flags) {
    CALL("rename", to, new, SYS_renameat2, from, old, to, new, flags);
}
int renameat(int from, const char *old, int to, const char *new) {
    return renameat2(from, old, to, new, 0);
}
int rename(const char *old, const char *new) {
    return renameat2(AT_FDCWD, old, AT_FDCWD, new, 0);
}
int unlinkat(int from, const char *path, int flags) {
    const char *name = flags & AT_REMOVEDIR ? "rmdir" : "unlink";
    CALL(name, from, path, SYS_unlinkat, from, path, flags);
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }
int mkdirat(int from, const char *path, mode_t mode) {
    CALL("mkdir", from, path, SYS_mkdirat, from, path, mode);
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }
int linkat(int from, const char *old, int to, const char *new, int flags) {
    CALL("link", to, new, SYS_linkat, from, old, to, new, flags);
}
int link(const char *old, const char *new) { return linkat(AT_FDCWD, old, AT_FDCWD, new, 0); }
int symlink(const char *old, const char *new) {
    CALL("symlink", AT_FDCWD, new, SYS_symlinkat, old, AT_FDCWD, new);
}
