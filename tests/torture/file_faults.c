/* Ends the process or fails at the n-th call that changes a file below a folder; loaded with LD_PRELOAD.
 *
 * Nothing is changed until `faults_arm` is called, which a trainer does in its own process. Only calls of that process
 * count, not those of its children: their order differs from run to run.
 *
 * Kinds of fault: 0 = only count; KILL = end the process group by SIGKILL, a write has then been done by half; any
 * other positive number = the call fails with that errno (at the n-th call alone, or from the n-th call on).
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
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define KILL (-1)

static char folder[PATH_MAX];
static size_t folder_length;
static atomic_long calls;
static long fault_at;
static int fault, lasting, armed;
static pid_t owner;
static char hit[PATH_MAX + 32];

void faults_arm(const char *path, long at, int kind, int goes_on) {
    snprintf(folder, sizeof folder, "%s", path);
    folder_length = strlen(folder);
    atomic_store(&calls, 0);
    fault_at = at, fault = kind, lasting = goes_on, owner = getpid(), armed = 1;
}

long faults_disarm(void) {
    armed = 0;
    return atomic_load(&calls);
}

const char *faults_hit(void) { return hit; }

static int is_below(const char *path) {
    char full[PATH_MAX];
    if (path == NULL) return 0;
    if (path[0] != '/') {
        if (getcwd(full, sizeof full) == NULL) return 0;
        return strncmp(full, folder, folder_length) == 0;
    }
    return strncmp(path, folder, folder_length) == 0;
}

static int is_open_below(int descriptor) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0) return 0;
    path[length] = 0;
    return is_below(path);
}

/* Counts a call; returns 1 if it is the one that fails. */
static int is_due(const char *name) {
    if (owner != getpid()) return 0;
    long now = atomic_fetch_add(&calls, 1) + 1;
    if (fault == 0 || now < fault_at || (now > fault_at && !lasting)) return 0;
    if (hit[0] == 0) snprintf(hit, sizeof hit, "%s", name);
    return 1;
}

static void die(void) {
    kill(-getpgrp(), SIGKILL);
    for (;;) pause();
}

static int fails(const char *name, int affected) {
    if (!armed || !affected || !is_due(name)) return 0;
    if (fault == KILL) die();
    errno = fault;
    return 1;
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (real == NULL) real = (type (*)(__VA_ARGS__)) dlsym(RTLD_NEXT, #name)

#define ON_PATH(name, parameters, arguments, ...) \
    int name parameters { \
        REAL(int, name, __VA_ARGS__); \
        if (armed && fails(#name, is_below(path))) return -1; \
        return real arguments; \
    }

ON_PATH(rename, (const char *path, const char *to), (path, to), const char *, const char *)
ON_PATH(renameat, (int a, const char *path, int b, const char *to), (a, path, b, to), int, const char *, int, const char *)
ON_PATH(renameat2, (int a, const char *path, int b, const char *to, unsigned f), (a, path, b, to, f), int, const char *, int, const char *, unsigned)
ON_PATH(mkdir, (const char *path, mode_t mode), (path, mode), const char *, mode_t)
ON_PATH(rmdir, (const char *path), (path), const char *)
ON_PATH(unlink, (const char *path), (path), const char *)
ON_PATH(link, (const char *from, const char *path), (from, path), const char *, const char *)
ON_PATH(symlink, (const char *from, const char *path), (from, path), const char *, const char *)
ON_PATH(truncate64, (const char *path, off64_t size), (path, size), const char *, off64_t)

/* relative to a descriptor: shutil.rmtree deletes with these */
#define AT_DESCRIPTOR(name, parameters, arguments, ...) \
    int name parameters { \
        REAL(int, name, __VA_ARGS__); \
        if (armed && fails(#name, path[0] == '/' || at == AT_FDCWD ? is_below(path) : is_open_below(at))) return -1; \
        return real arguments; \
    }

AT_DESCRIPTOR(unlinkat, (int at, const char *path, int flags), (at, path, flags), int, const char *, int)
AT_DESCRIPTOR(mkdirat, (int at, const char *path, mode_t mode), (at, path, mode), int, const char *, mode_t)

#define ON_DESCRIPTOR(name, parameters, arguments, ...) \
    int name parameters { \
        REAL(int, name, __VA_ARGS__); \
        if (armed && fails(#name, is_open_below(descriptor))) return -1; \
        return real arguments; \
    }

ON_DESCRIPTOR(fsync, (int descriptor), (descriptor), int)
ON_DESCRIPTOR(fdatasync, (int descriptor), (descriptor), int)
ON_DESCRIPTOR(ftruncate64, (int descriptor, off64_t size), (descriptor, size), int, off64_t)
ON_DESCRIPTOR(ftruncate, (int descriptor, off_t size), (descriptor, size), int, off_t)

/* A write that is killed has written its first half, as a write that the kernel has begun. */
#define WRITES(name, parameters, arguments, half, ...) \
    ssize_t name parameters { \
        REAL(ssize_t, name, __VA_ARGS__); \
        if (armed && descriptor > 2 && is_open_below(descriptor) && is_due(#name)) { \
            if (fault != KILL) { errno = fault; return -1; } \
            half; \
            die(); \
        } \
        return real arguments; \
    }

WRITES(write, (int descriptor, const void *data, size_t size), (descriptor, data, size),
       if (size > 1 && real(descriptor, data, size / 2) < 0) {}, int, const void *, size_t)
WRITES(pwrite64, (int descriptor, const void *data, size_t size, off64_t at), (descriptor, data, size, at),
       if (size > 1 && real(descriptor, data, size / 2, at) < 0) {}, int, const void *, size_t, off64_t)
WRITES(writev, (int descriptor, const struct iovec *parts, int count), (descriptor, parts, count),
       if (count > 1 && real(descriptor, parts, count / 2) < 0) {}, int, const struct iovec *, int)
WRITES(sendfile64, (int descriptor, int from, off64_t *at, size_t size), (descriptor, from, at, size), ,
       int, int, off64_t *, size_t)

ssize_t copy_file_range(int from, off64_t *at, int descriptor, off64_t *to, size_t size, unsigned flags) {
    REAL(ssize_t, copy_file_range, int, off64_t *, int, off64_t *, size_t, unsigned);
    if (armed && fails("copy_file_range", is_open_below(descriptor))) return -1;
    return real(from, at, descriptor, to, size, flags);
}

/* Opening a file changes something if it may create or empty it. */
static int changes(int flags) { return flags & (O_CREAT | O_TRUNC); }

#define OPENS(name) \
    int name(const char *path, int flags, ...) { \
        REAL(int, name, const char *, int, ...); \
        mode_t mode = 0; \
        if (flags & (O_CREAT | O_TMPFILE)) { \
            va_list rest; \
            va_start(rest, flags); \
            mode = va_arg(rest, mode_t); \
            va_end(rest); \
        } \
        if (armed && changes(flags) && fails(#name, is_below(path))) return -1; \
        return real(path, flags, mode); \
    }

OPENS(open)
OPENS(open64)

#define OPENS_AT(name) \
    int name(int at, const char *path, int flags, ...) { \
        REAL(int, name, int, const char *, int, ...); \
        mode_t mode = 0; \
        if (flags & (O_CREAT | O_TMPFILE)) { \
            va_list rest; \
            va_start(rest, flags); \
            mode = va_arg(rest, mode_t); \
            va_end(rest); \
        } \
        if (armed && changes(flags) && fails(#name, is_below(path))) return -1; \
        return real(at, path, flags, mode); \
    }

OPENS_AT(openat)
OPENS_AT(openat64)
